// Where threads run. Plain C ABI.

#include <cstdint>
#if defined(__linux__)
#include <sched.h>
#endif

// The caller, and those that it computes with, run on no processors from now on but those whose bits are set.
extern "C" void quire_stay(const char* mask, int64_t num_bytes, int64_t threads) {
#if defined(__linux__)
#pragma omp parallel num_threads(threads)
  sched_setaffinity(0, num_bytes, (const cpu_set_t*)mask);
#endif
}
