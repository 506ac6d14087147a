// The backward kernels of activations that are linear on either side of zero: a file of their own compiles beside
// the others.
#include "cuda_bwd.cuh"

namespace fusedattn {

FUSEDATTN_LINEAR_BWD(, float)
FUSEDATTN_LINEAR_BWD(, double)
FUSEDATTN_LINEAR_BWD(, __half)
FUSEDATTN_LINEAR_BWD(, __nv_bfloat16)

}  // namespace fusedattn
