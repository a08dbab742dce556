// Instruction sets that kernels are compiled for (isa.h), each with all that the ones before it have.
#pragma once
#include <cstdint>

enum Isa : int32_t { BASELINE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };

// Whether cores wait for few lines of their first cache at a time, as AMD's do before Zen 5: what is asked for goes into the
// second one, and what few rows read in order is not asked for, since it comes faster by itself (isa.cpp).
extern const bool ASKS_FAR;
