// Products with packed weights (linear.cpp), for whoever calls them: calls.py, quantized.cpp and experts.cpp.
#pragma once
#include <cstdint>

constexpr int64_t BLOCK = 64;      // outputs
constexpr int64_t MOST_ROWS = 96;  // whose sums are kept while a block of outputs is computed

enum Kind : int32_t { FLOATS = 0, BF16 = 1, BYTES = 2 };

struct LinearCall {
  int32_t isa, threads, kind, out_bf16, bias_bf16;
  void* out;
  const void *x, *weight, *bias;  // bias may be null
  const float* x_scales;          // these three of BYTES only
  const int32_t* x_sums;
  const float* weight_scales;
  int64_t rows, outputs, units, x_stride_bytes, groups, x_group_bytes;
  int64_t x_row_bytes;  // where that is less than 4 * units, rows are copied to be as long
};

extern "C" void quire_linear(const void* args);

// The product of one group. Rows of x are as long as the weight's.
struct Linear {
  void* out;
  const void *x, *weight, *bias;           // bias may be null
  const float *x_scales, *weight_scales;   // of bytes
  const int32_t* x_sums;
  int64_t rows, outputs, units, x_stride_bytes, out_stride;
  int32_t kind;
  bool out_bf16, bias_bf16;
};

// 64 outputs of all rows; `sums` has room for [MOST_ROWS][BLOCK].
void linear_block(int32_t isa, const Linear& one, int64_t block, float* sums);
