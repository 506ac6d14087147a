// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per level) of attention_pool
// share.
//
// Rows are instances, `step` elements apart. Numbers that lie by head, K of them for a row, are in the type of the
// arithmetic, those of a head neighbours and heads `stride` apart.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/storage.h"

namespace fusedattn {

struct PoolFeatures {
  int64_t rows, D, K;
  const void *hidden, *gate;  // gate may be null
  int64_t hidden_step, gate_step;
  const void* weight;  // (K, D) in the type of the arithmetic
};

struct PoolValues {
  int64_t rows, Dv, K;
  const void* value;
  int64_t step;
};

struct AttentionPoolKernels {
  // scores of each head; room for D numbers
  void (*score)(StorageType, const PoolFeatures&, void* scores, int64_t stride, void* room);
  // exp(scores - shift) of n numbers, and their sum
  double (*exponentials)(StorageType, int64_t n, const void* scores, double shift, void* out);
  // sums (K, Dv) += p value
  void (*pool)(StorageType, const PoolValues&, const void* p, int64_t stride, void* sums);
  // dp = dcontext . value, and dvalue = p dcontext unless it is null; dcontext (K, Dv)
  void (*value_gradients)(StorageType, const PoolValues&, const void* dcontext, const void* p, int64_t stride,
                          void* dp, void* dvalue, bool streamed);
  // from the gradients of scores: those of hidden and gate, either of which may be null, and dweight (K, D) +=
  void (*feature_gradients)(StorageType, const PoolFeatures&, const void* dscores, int64_t stride, void* dhidden,
                            void* dgate, void* dweight, bool streamed);
  // see common/elementwise.h
  void (*widen)(StorageType, int64_t n, int64_t step, const void* in, void* out, bool added);
  void (*narrow)(StorageType, int64_t n, const void* in, void* out);
};

FUSEDATTN_DECLARE_TABLE(AttentionPoolKernels, attention_pool)

}  // namespace fusedattn
