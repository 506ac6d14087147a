// Which keys the mask lets some query see: what the others hold is not looked at.
//
// A mask without rows of its own says so itself. Of others a kernel finds it, a byte for each D tanh of a pair: a
// block has 32 keys of a mask, its warps share the queries.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

constexpr int SEEN_BLOCK = 256;

// Masks that differ; a key's place among them is that of its batch element and head.
template <typename S>
struct Masks {
  int64_t batches, heads;
  bool rows;  // of their own
  explicit Masks(const AttentionProblem<S>& p)
      : batches(p.mask_stride[0] == 0 ? 1 : p.B),
        heads(p.mask_stride[1] == 0 ? 1 : p.H),
        rows(p.mask != nullptr && p.Tq > 1 && p.mask_stride[2] != 0) {}
};

// Both passes ask for it, each compiled on its own.
template <typename S, bool backward>
__global__ void __launch_bounds__(SEEN_BLOCK)
    additive_attention_kernel_seen(const AttentionProblem<S> p, int64_t heads, int64_t key_tiles, bool* seen) {
  FUSEDATTN_DYNAMIC_SHARED(int, shared);
  constexpr int WARPS = SEEN_BLOCK / gpu::WARP;
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const int64_t n = blockIdx.x / key_tiles, j0 = blockIdx.x % key_tiles * gpu::WARP, j = j0 + lane;
  const bool* mask = p.mask + n / heads * p.mask_stride[0] + n % heads * p.mask_stride[1] + j * p.mask_stride[3];
  int found = 0;
  if (j < p.Tk)
#pragma unroll 8
    for (int64_t i = (has_window(p.options) ? j0 : 0) + warp; i < p.Tq; i += WARPS)
      found |= mask[i * p.mask_stride[2]] & (j <= i || !has_window(p.options));
  shared[threadIdx.x] = found;
  __syncthreads();
  if (warp != 0 || j >= p.Tk) return;
  for (int other = 1; other < WARPS; ++other) found |= shared[other * gpu::WARP + lane];
  seen[n * p.Tk + j] = found != 0;
}

// Elements of working memory that with_seen_keys takes.
template <typename S>
int64_t seen_workspace(const AttentionProblem<S>& p) {
  const Masks<S> masks(p);
  return masks.rows ? gpu::ceil_div(masks.batches * masks.heads * p.Tk, sizeof(gpu::Arithmetic<S>)) : 0;
}

// p, knowing them.
template <bool backward, typename S>
AttentionProblem<S> with_seen_keys(AttentionProblem<S> p, gpu::Arithmetic<S>* workspace, cudaStream_t stream) {
  if (p.mask == nullptr) return p;
  const Masks<S> masks(p);
  const int64_t key_tiles = gpu::ceil_div(p.Tk, gpu::WARP), blocks = masks.batches * masks.heads * key_tiles;
  if (!masks.rows) {
    p.seen = p.mask;
    p.seen_stride[0] = p.mask_stride[0], p.seen_stride[1] = p.mask_stride[1], p.seen_stride[2] = p.mask_stride[3];
  } else if (blocks > 0) {
    bool* seen = reinterpret_cast<bool*>(workspace);
    FUSEDATTN_LAUNCH((additive_attention_kernel_seen<S, backward>), blocks, SEEN_BLOCK, SEEN_BLOCK * sizeof(int),
                     stream, p, masks.heads, key_tiles, seen);
    p.seen = seen;
    p.seen_stride[0] = p.mask_stride[0] == 0 ? 0 : masks.heads * p.Tk;
    p.seen_stride[1] = p.mask_stride[1] == 0 ? 0 : p.Tk, p.seen_stride[2] = 1;
  }
  return p;
}

}  // namespace fusedattn
