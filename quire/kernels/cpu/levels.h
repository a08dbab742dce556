// Instruction sets that kernels are compiled for (isa.h), each with all that the ones before it have.
#pragma once
#include <cstdint>

enum Isa : int32_t { BASELINE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };

// Of this machine's cores (isa.cpp). FETCHES_AHEAD, as AMD's: what one thread reads in order for one row comes faster if
// nothing is asked for. ASKS_FAR, as AMD's before Zen 5: so it does for a few rows and on several threads, and what is asked
// for goes into the second cache, where these cores wait for more lines at a time.
extern const bool FETCHES_AHEAD, ASKS_FAR;
