// Activations of rows (elementwise.cpp), for whoever calls them: calls.py and experts.cpp.
#pragma once
#include <cstdint>

// As in products.py. The last one is a gate's only.
enum Activation : int32_t { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, RELU2 = 4, SIGMOID = 5, SWIGLU_OAI = 6 };

constexpr int64_t PARALLEL_ELEMENTS = 32768;  // fewer are done before other threads would have begun

struct Act {
  int32_t isa, threads, is_bf16;
  void* out;      // [rows], `out_stride` numbers from one to the next
  const void* x;  // gated: [rows][2][size], gates first
  int64_t rows, size, out_stride;
  int32_t kind, gated;
};

void activate_row(const Act& a, int64_t row);
