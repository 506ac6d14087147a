// Which keys the queries of a tile, and those of a head, see: what lies outside is not computed, and what keys
// hold that no query sees is not looked at.
//
// Of windows around i both follow from the tile's number. Of windows around given centers a kernel finds what
// those of a tile's queries lie within, a warp for each tile. A mask without rows of its own says itself which
// keys some query sees. Of other masks, and of centers, a kernel finds it, a byte for each D tanh of a pair: a
// block has 32 keys of a mask, its warps share the queries.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

constexpr int SEEN_BLOCK = 256;

// Masks, with centers, that differ; a key's place among them is that of its batch element and head.
template <typename S>
struct Masks {
  int64_t batches, heads;
  bool rows;  // of their own
  explicit Masks(const AttentionProblem<S>& p)
      : batches(differs(p, 0) ? p.B : 1),
        heads(differs(p, 1) ? p.H : 1),
        rows(p.Tq > 1 && (p.center != nullptr || (p.mask != nullptr && p.mask_stride[2] != 0))) {}

  static bool differs(const AttentionProblem<S>& p, int n) {
    return (p.mask != nullptr && p.mask_stride[n] != 0) || (p.center != nullptr && p.center_stride[n] != 0);
  }
};

// Both passes ask for these, each compiled on its own.
template <typename S, bool backward>
__global__ void __launch_bounds__(SEEN_BLOCK)
    additive_attention_kernel_hulls(const AttentionProblem<S> p, KeyRange* hulls) {
  const int lane = threadIdx.x % gpu::WARP;
  const int64_t tile = int64_t{blockIdx.x} * (SEEN_BLOCK / gpu::WARP) + threadIdx.x / gpu::WARP;
  if (tile >= p.heads() * p.query_tiles()) return;
  const Head at(p, tile / p.query_tiles());
  const int64_t i0 = tile % p.query_tiles() * BLOCK_Q, end = lower(p.Tq, i0 + BLOCK_Q);
  KeyRange hull = {p.Tk, 0};
  for (int64_t i = i0 + lane; i < end; i += gpu::WARP) {
    const KeyRange keys = p.keys_of(at.b, at.h, i);
    if (keys.first < keys.end) hull = {lower(hull.first, keys.first), higher(hull.end, keys.end)};
  }
#pragma unroll
  for (int step = gpu::WARP / 2; step > 0; step /= 2) {
    hull.first = lower(hull.first, __shfl_xor_sync(gpu::ALL_LANES, hull.first, step));
    hull.end = higher(hull.end, __shfl_xor_sync(gpu::ALL_LANES, hull.end, step));
  }
  if (lane == 0) hulls[tile] = hull;
}

template <typename S, bool backward>
__global__ void __launch_bounds__(SEEN_BLOCK)
    additive_attention_kernel_seen(const AttentionProblem<S> p, int64_t heads, int64_t key_tiles, bool* seen) {
  FUSEDATTN_DYNAMIC_SHARED(int, shared);
  constexpr int WARPS = SEEN_BLOCK / gpu::WARP;
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const int64_t n = blockIdx.x / key_tiles, j0 = blockIdx.x % key_tiles * gpu::WARP, j = j0 + lane;
  const int64_t b = n / heads, h = n % heads;
  const bool* mask = p.mask + b * p.mask_stride[0] + h * p.mask_stride[1] + j * p.mask_stride[3];
  int found = 0;
  if (j < p.Tk && !has_window(p.options)) {
#pragma unroll 8
    for (int64_t i = warp; i < p.Tq; i += WARPS) found |= mask[i * p.mask_stride[2]];
  } else if (j < p.Tk) {
    const QueryRange queries = p.queries_of({j0, j0 + gpu::WARP});
#pragma unroll 2
    for (int64_t i = queries.first + warp; i < queries.end; i += WARPS) {
      const KeyRange keys = p.keys_of(b, h, i);
      found |= j >= keys.first && j < keys.end && (p.mask == nullptr || mask[i * p.mask_stride[2]]);
    }
  }
  shared[threadIdx.x] = found;
  __syncthreads();
  if (warp != 0 || j >= p.Tk) return;
  for (int other = 1; other < WARPS; ++other) found |= shared[other * gpu::WARP + lane];
  seen[n * p.Tk + j] = found != 0;
}

// Elements of working memory that prepared takes: hulls, then bytes.
template <typename S>
int64_t hulls_workspace(const AttentionProblem<S>& p) {
  const int64_t tiles = p.center == nullptr || p.Tq == 1 ? 0 : p.heads() * p.query_tiles();
  return tiles * (sizeof(KeyRange) / sizeof(gpu::Arithmetic<S>));
}
template <typename S>
int64_t seen_workspace(const AttentionProblem<S>& p) {
  const Masks<S> masks(p);
  const int64_t bytes = masks.rows ? masks.batches * masks.heads * p.Tk : 0;
  return hulls_workspace(p) + gpu::ceil_div(bytes, sizeof(gpu::Arithmetic<S>));
}

// p with its factors and which keys are seen. The window of a single query is the hull, and all that it sees.
template <bool backward, typename S>
AttentionProblem<S> prepared(AttentionProblem<S> p, gpu::Arithmetic<S>* workspace, cudaStream_t stream) {
  p.by = Factors<gpu::Arithmetic<S>>(p.options);
  const Masks<S> masks(p);
  const int64_t hulls = hulls_workspace(p), tiles = p.heads() * p.query_tiles();
  const int64_t key_tiles = gpu::ceil_div(p.Tk, gpu::WARP), blocks = masks.batches * masks.heads * key_tiles;
  if (masks.rows && blocks > 0) {
    bool* seen = reinterpret_cast<bool*>(workspace + hulls);
    FUSEDATTN_LAUNCH((additive_attention_kernel_seen<S, backward>), blocks, SEEN_BLOCK, SEEN_BLOCK * sizeof(int),
                     stream, p, masks.heads, key_tiles, seen);
    p.seen = seen;
    p.seen_stride[0] = masks.batches == 1 ? 0 : masks.heads * p.Tk;
    p.seen_stride[1] = masks.heads == 1 ? 0 : p.Tk, p.seen_stride[2] = 1;
  } else if (p.mask != nullptr) {
    p.seen = p.mask;
    p.seen_stride[0] = p.mask_stride[0], p.seen_stride[1] = p.mask_stride[1], p.seen_stride[2] = p.mask_stride[3];
  }
  if (hulls > 0) {
    FUSEDATTN_LAUNCH((additive_attention_kernel_hulls<S, backward>), gpu::ceil_div(tiles, SEEN_BLOCK / gpu::WARP),
                     SEEN_BLOCK, 0, stream, p, reinterpret_cast<KeyRange*>(workspace));
    p.hulls = reinterpret_cast<KeyRange*>(workspace);
  }
  return p;
}

}  // namespace fusedattn
