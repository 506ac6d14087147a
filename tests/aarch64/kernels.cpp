// Runs the CPU kernels of the default level on fixed problems, without torch, and keeps what comes out:
//
//   kernels write FILE     on one machine
//   kernels compare FILE   on another: how far its results are from those, an error where too far
//
// Inputs are the same on every machine, bit for bit. Buffers end where they are said to end, so that a sanitizer
// or an emulator sees what goes beyond.
#include "harness.h"

int main(int arguments, char** argument) {
  using namespace fusedattn;
  if (arguments != 3 || (std::strcmp(argument[1], "write") != 0 && std::strcmp(argument[1], "compare") != 0))
    fail("expected: kernels write|compare FILE");
  Results results(std::strcmp(argument[1], "write") == 0, argument[2]);
  attention_results(results);
  attention_family_results(results);
  conditioning_results(results);
  if (!results.writes)
    std::printf("%d arrays of results, at most %g units of rounding apart\n", results.arrays, results.worst);
  return results.failures == 0 ? 0 : 1;
}
