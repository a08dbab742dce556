// Instruction sets that kernels are compiled for (isa.h), each with all that the ones before it have.
#pragma once
#include <cstdint>

enum Isa : int32_t { BASELINE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };
