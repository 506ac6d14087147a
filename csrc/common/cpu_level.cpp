#include "cpu_level.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace fusedattn {
namespace {

const char* const NAMES[] = {"default", "avx2", "avx512"};

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int choose() {
  const int best = detect();
  const char* wanted = std::getenv("FUSEDATTN_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level < 3; ++level)
    if (std::string(wanted) == NAMES[level]) return level < best ? level : best;
  STD_TORCH_CHECK(false, "FUSEDATTN_CPU_CAPABILITY: expected default, avx2 or avx512, got '", wanted, "'");
  return best;
}

std::string cpu_capability() { return NAMES[static_cast<int>(cpu_level())]; }

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = static_cast<CpuLevel>(choose());
  return level;
}

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fusedattn
