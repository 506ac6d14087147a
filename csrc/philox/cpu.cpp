// CPU launcher of the random words themselves.
#include "common/box.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "cpu_stream.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor philox_words(const Tensor& seed, const Tensor& like, const PhiloxPlace& place) {
  STD_TORCH_CHECK(like.dim() == 3 || like.dim() == 4, "philox_words: like: expected shape (B, Tq, Tk) or ",
                  "(B, H, Tq, Tk), got ", like.dim(), " dimensions");
  const int64_t H = like.dim() == 3 ? 1 : like.size(1), Tq = like.size(-2), Tk = like.size(-1);
  const PhiloxStream stream = stream_of("philox_words: seed", seed, H, place);
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n < like.dim(); ++n) sizes.push_back(like.size(n));
  const Tensor words = empty(sizes, ScalarType::Int);
  int32_t* const out = words.mutable_data_ptr<int32_t>();
  parallel_for(like.size(0) * H * Tq, 1 + 65536 / (Tk + 1), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      FUSEDATTN_LEVEL_TABLE(philox_kernels)
          .words(philox_row(stream, r / Tq / H, r / Tq % H, r % Tq), Tk, out + r * Tk);
  });
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) { m.impl("philox_words", boxed<philox_words>); }

}  // namespace fusedattn
