// What quire_linear takes (linear.cpp), for whoever calls it: calls.py, and quantized.cpp.
#pragma once
#include <cstdint>

enum Kind : int32_t { FLOATS = 0, BF16 = 1, BYTES = 2 };

struct LinearCall {
  int32_t isa, threads, kind, out_bf16, bias_bf16;
  void* out;
  const void *x, *weight, *bias;  // bias may be null
  const float* x_scales;          // these three of BYTES only
  const int32_t* x_sums;
  const float* weight_scales;
  int64_t rows, outputs, units, x_stride_bytes, groups, x_group_bytes;
};

extern "C" void quire_linear(const void* args);
