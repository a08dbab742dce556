// Norms, rotations and activations of rows on a CPU: float32 inside, float32 or bf16 outside. Plain C ABI.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, RELU2 = 4, SIGMOID = 5 };  // as in ops.py

constexpr int64_t PARALLEL_ELEMENTS = 32768;  // fewer are done before other threads would have begun

struct RmsNorm {
  void* out;
  const void *x, *weight;  // weight may be null
  int64_t size, stride;
  float eps, offset;
  bool is_bf16;
};

struct NormRope {
  void* x;
  int64_t num_heads, size, stride, half;
  const float* weight;  // [num_heads][size] or null
  float eps;
  const float *cos, *sin;  // [max_length][half]
  const int64_t* positions;
  bool is_bf16;
};

struct Act {
  void* out;
  const void* x;  // gated: [rows][2][size], gates first
  int64_t size;
  int32_t kind;
  bool gated, is_bf16;
};

#define QUIRE_KERNELS "elementwise.inl"
#include "isa.h"

}  // namespace

extern "C" void quire_rms_norm(int32_t isa, int32_t threads, int32_t is_bf16, void* out, const void* x,
                               const void* weight, int64_t rows, int64_t size, int64_t stride, float eps,
                               float offset) {
  const RmsNorm args{out, x, weight, size, stride, eps, offset, is_bf16 != 0};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1 && rows * size >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < rows; r++) {
    QUIRE_CALL(isa, rms_norm(args, r));
  }
}

extern "C" void quire_norm_rope(int32_t isa, int32_t threads, int32_t is_bf16, void* x, int64_t rows,
                                int64_t num_heads, int64_t size, int64_t stride, int64_t half, const float* weight,
                                float eps, const float* cos, const float* sin, const int64_t* positions) {
  const NormRope args{x, num_heads, size, stride, half, weight, eps, cos, sin, positions, is_bf16 != 0};
  const int64_t work = rows * num_heads * size;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1 && work >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < rows; r++) {
    QUIRE_CALL(isa, norm_rope(args, r));
  }
}

extern "C" void quire_act(int32_t isa, int32_t threads, int32_t is_bf16, void* out, const void* x, int64_t rows,
                          int64_t size, int32_t kind, int32_t gated) {
  const Act args{out, x, size, kind, gated != 0, is_bf16 != 0};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1 && rows * size >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < rows; r++) {
    QUIRE_CALL(isa, act(args, r));
  }
}
