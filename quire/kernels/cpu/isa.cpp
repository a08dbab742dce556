// Which instruction set this machine has. Plain C ABI.

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define QUIRE_X86 1
#include <cpuid.h>
#endif

namespace {

#if defined(QUIRE_X86) && defined(__linux__)
// Linux gives AMX's large registers to processes that ask.
bool may_use_tiles() {
  const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
bool may_use_tiles() { return false; }
#endif

// AMD's family of cores, 0x1a being Zen 5; 0 of others.
uint32_t amd_family() {
#if defined(QUIRE_X86)
  __builtin_cpu_init();
  uint32_t version, unused;
  if (__builtin_cpu_is("amd") && __get_cpuid(1, &version, &unused, &unused, &unused))
    return (version >> 8 & 15) + (version >> 20 & 255);
#endif
  return 0;
}

}  // namespace

const bool FETCHES_AHEAD = amd_family() > 0, ASKS_FAR = FETCHES_AHEAD && amd_family() < 0x1a;

// The version of all functions' arguments; native.py refuses a library that was built from another one.
extern "C" int32_t quire_abi() { return 20; }

extern "C" int32_t quire_isa() {
#if defined(QUIRE_X86)
  __builtin_cpu_init();
  const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                   __builtin_cpu_supports("amx-int8");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool products = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (avx512 && products) return amx && may_use_tiles() ? AMX : AVX512_BF16;
  if (avx512) return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return BASELINE;
}

// Calls functions[i] with the arguments at args + offsets[i], one after the other: what Python has called before.
extern "C" void quire_replay(const void* const* functions, const char* args, const int64_t* offsets, int64_t count) {
  for (int64_t i = 0; i < count; i++) ((void (*)(const void*))functions[i])(args + offsets[i]);
}
