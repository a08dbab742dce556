// Compiles QUIRE_KERNELS, a file of kernels, once per instruction set, each in a namespace of its own; callers
// choose one at run time with QUIRE_CALL. No guard: every file of kernels includes this once.
#include "levels.h"

#define QUIRE_ISA 0
namespace baseline {
#include QUIRE_KERNELS
}
#undef QUIRE_ISA

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define QUIRE_X86 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define QUIRE_ISA 1
namespace avx2 {
#include QUIRE_KERNELS
}
#undef QUIRE_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define QUIRE_ISA 2
namespace avx512 {
#include QUIRE_KERNELS
}
#undef QUIRE_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,prefer-vector-width=512")
#define QUIRE_ISA 3
namespace avx512_bf16 {
#include QUIRE_KERNELS
}
#undef QUIRE_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,prefer-vector-width=512")
#pragma GCC target("amx-tile,amx-bf16,amx-int8")
#define QUIRE_ISA 4
namespace amx {
#include QUIRE_KERNELS
}
#undef QUIRE_ISA
#pragma GCC pop_options

#define QUIRE_CALL(isa, ...)                           \
  switch (isa) {                                       \
    case AMX: amx::__VA_ARGS__; break;                 \
    case AVX512_BF16: avx512_bf16::__VA_ARGS__; break; \
    case AVX512: avx512::__VA_ARGS__; break;           \
    case AVX2: avx2::__VA_ARGS__; break;               \
    default: baseline::__VA_ARGS__;                    \
  }
#else
#define QUIRE_CALL(isa, ...) baseline::__VA_ARGS__
#endif
