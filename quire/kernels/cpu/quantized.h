// Rows of int8 and products with weights of 4 bits (quantized.cpp), for experts.cpp.
#pragma once
#include <cstdint>

#include "finish.h"

constexpr int64_t GROUP = 64;  // inputs with a scale of their own, of 4 bits

struct Rows {
  char* out;       // [rows, padded] int8, or what products make of it where they are not grouped (linear.h)
  float* scales;   // [rows]
  int32_t* sums;   // [rows], or [rows, padded / GROUP] where grouped; of one row alone, rounded up
  const void* x;
  int64_t inputs, padded, x_stride_bytes;
  bool is_bf16, grouped;
  const int32_t* of = nullptr;  // which row of x each is; null: the same
};

void quantize_row(int32_t isa, const Rows& a, int64_t row);

struct Product {
  const int8_t* x;
  const int32_t *x_sums, *weight;
  const uint16_t* scales;
  int64_t rows, padded;
  Finish finish;
};

// All rows of an item of results (finish.h); `sums` has room for MOST_SUMS.
void nibble_item(int32_t isa, const Product& a, int64_t item, float* sums);
