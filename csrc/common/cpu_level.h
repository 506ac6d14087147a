// Which compiled level of the CPU kernels runs on this machine.
#pragma once

#include <cstdint>

namespace fusedattn {

enum class CpuLevel { DEFAULT = 0, AVX2 = 1, AVX512 = 2 };

// The best level that this CPU has, lowered by FUSEDATTN_CPU_CAPABILITY=default|avx2|avx512; read once.
CpuLevel cpu_level();

// Declares the kernel table that every level defines in its namespace.
#define FUSEDATTN_DECLARE_TABLE(type, table) \
  namespace default_ {                       \
  extern const type table;                   \
  }                                          \
  namespace avx2 {                           \
  extern const type table;                   \
  }                                          \
  namespace avx512 {                         \
  extern const type table;                   \
  }

// Picks one of these. On other architectures only the default level exists.
#if defined(__x86_64__)
#define FUSEDATTN_LEVEL_TABLE(table)                                         \
  (::fusedattn::cpu_level() == ::fusedattn::CpuLevel::AVX512 ? avx512::table \
   : ::fusedattn::cpu_level() == ::fusedattn::CpuLevel::AVX2 ? avx2::table   \
                                                             : default_::table)
#else
#define FUSEDATTN_LEVEL_TABLE(table) (default_::table)
#endif

}  // namespace fusedattn
