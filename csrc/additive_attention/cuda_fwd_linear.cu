// The forward kernels of activations that are linear on either side of zero: a file of their own compiles beside
// the others.
#include "cuda_fwd.cuh"

namespace fusedattn {

FUSEDATTN_LINEAR_FWD(, float)
FUSEDATTN_LINEAR_FWD(, double)
FUSEDATTN_LINEAR_FWD(, __half)
FUSEDATTN_LINEAR_FWD(, __nv_bfloat16)

}  // namespace fusedattn
