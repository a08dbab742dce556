// Products with packed weights (linear.cpp), for whoever calls them: calls.py, quantized.cpp and experts.cpp.
#pragma once
#include <cstdint>

#include "finish.h"
#include "levels.h"

// Bytes of an input as products take it.
inline int64_t prepared_bytes(int32_t isa, Kind kind) {
  const int64_t widened = isa < AVX512_BF16 ? 2 : 1;
  return kind == FLOATS ? 4 : kind == BF16 ? 2 * widened : widened;
}

struct LinearCall {
  int32_t isa, threads, kind, out_bf16, bias_bf16;
  void* out;
  const void *x, *weight, *bias;  // bias may be null
  const float* x_scales;          // these three of BYTES only
  const int32_t* x_sums;
  const float* weight_scales;
  int64_t rows, outputs, units, x_stride_bytes, groups, x_group_bytes;
  int64_t x_row_bytes;  // of its inputs, which may be fewer than the weight's
  Fused fused;          // of one group
};

extern "C" void quire_linear(const void* args);

// The product of one group. Rows of x are prepared, and as long as the weight's.
struct Linear {
  const void *x, *weight;
  int64_t rows, units, x_stride_bytes;
  Finish finish;
};

// A row of `count` floats or bf16 as products take it, with zeros up to `padded`.
void prepare_row(int32_t isa, int32_t kind, void* out, const void* x, int64_t count, int64_t padded);

// All rows of an item of results (finish.h); `sums` has room for MOST_SUMS.
void linear_item(int32_t isa, const Linear& a, int64_t item, float* sums);
