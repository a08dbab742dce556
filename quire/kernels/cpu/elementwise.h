// Activations of rows (elementwise.cpp), for whoever calls them: calls.py and experts.cpp.
#pragma once
#include <cstdint>

struct Act {
  int32_t isa, threads, is_bf16;
  void* out;      // [rows], `out_stride` numbers from one to the next
  const void* x;  // gated: [rows][2][size], gates first
  int64_t rows, size, out_stride;
  int32_t kind, gated;
};

void activate_row(const Act& a, int64_t row);
