// What the launchers ask for on the architecture named by the argument (75): prints kernel and dynamic shared
// memory of every launch that typical problems lead to. Nothing is launched, so this runs anywhere. A new launcher
// belongs into all() below.
#include <cstdio>
#include <cstdlib>

#include "common/cuda.cuh"

static int asked_architecture = 0;
int cuda_emulator::architecture() { return asked_architecture; }

#undef FUSEDATTN_LAUNCH
#define FUSEDATTN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) record<(kernel)>(shared_bytes)

namespace {

template <auto kernel>
void record(size_t shared_bytes) {
  std::printf("%zu %s\n", shared_bytes, __PRETTY_FUNCTION__);  // which names the kernel and its arguments
}

}  // namespace

#include "additive_attention/cuda_bwd.cuh"
#include "additive_attention/cuda_fwd.cuh"
#include "film/cuda_bwd.cuh"
#include "film/cuda_fwd.cuh"

namespace {

using namespace fusedattn;

// An address that nothing reads: only its alignment counts.
template <typename T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{4096});
}

template <typename S>
void film(int64_t M, int64_t C, int64_t N) {
  using T = gpu::Arithmetic<S>;
  const gpu::Numbers<S> parameter = {somewhere<S>(), false};
  const FilmProblem<S> p = {16, M, C, N, somewhere<S>(), parameter, parameter, C, C, {}};
  launch_film_fwd<S>(p, nullptr, somewhere<S>(), nullptr);
  launch_film_bwd<S>(p, somewhere<S>(), somewhere<S>(), parameter, parameter, somewhere<T>(), nullptr);
}

template <typename S>
void attention(ScoreActivation activation, int64_t B, int64_t Tq, int64_t Tk, int64_t D, bool biased = false) {
  using T = gpu::Arithmetic<S>;
  AttentionProblem<S> p = {};
  p.B = B, p.H = 1, p.Tq = Tq, p.Tk = Tk, p.D = D, p.Dv = D;
  const RowsOf<S> queries(somewhere<S>(), Tq * D, Tq * D, D), keys(somewhere<S>(), Tk * D, Tk * D, D);
  p.query = queries, p.key = keys, p.value = keys;
  p.weight = {somewhere<S>(), false};
  p.mask = somewhere<bool>();
  p.mask_stride[0] = p.mask_stride[1] = Tq * Tk, p.mask_stride[2] = Tk, p.mask_stride[3] = 1;
  if (biased) p.bias = {somewhere<S>(), false};
  p.bias_size[0] = p.bias_size[1] = 1, p.bias_size[2] = Tq, p.bias_size[3] = Tk;
  p.center = somewhere<int64_t>();
  p.options.activation = activation;
  for (bool tf32 : {false, true})
    launch_additive_attention_fwd<S>(p, somewhere<S>(), somewhere<T>(), somewhere<T>(), somewhere<S>(),
                                     somewhere<T>(), nullptr, tf32);
  for (const T* scores : {static_cast<T*>(nullptr), somewhere<T>()}) {  // computed again, or kept
    const AttentionGradients<S> grads = {
        queries,        somewhere<T>(), somewhere<S>(),          queries, somewhere<T>(), scores, somewhere<S>(),
        somewhere<S>(), somewhere<S>(), {somewhere<S>(), false}, p.bias};
    launch_additive_attention_bwd<S>(p, grads, somewhere<T>(), nullptr);
  }
}

template <typename S>
void all() {
  film<S>(1, 256, 4096);
  film<S>(4096, 256, 1);
  film<S>(4096, 8, 1);
  film<S>(4096, 7, 1);
  for (ScoreActivation activation : {ScoreActivation::TANH, ScoreActivation::RELU}) {
    attention<S>(activation, 4, 512, 512, 256);
    attention<S>(activation, 64, 1, 1024, 512);
    attention<S>(activation, 128, 10, 128, 1024);
    attention<S>(activation, 64, 8, 1024, 512);
    attention<S>(activation, 4, 0, 512, 256);
  }
  attention<S>(ScoreActivation::TANH, 4, 512, 512, 256, true);
  attention<S>(ScoreActivation::TANH, 64, 1, 1024, 512, true);
  attention<S>(ScoreActivation::TANH, 64, 8, 1024, 512, true);
}

}  // namespace

int main(int, char** arguments) {
  asked_architecture = std::atoi(arguments[1]);
  all<float>();
  all<double>();
  all<__half>();
  all<__nv_bfloat16>();
}
