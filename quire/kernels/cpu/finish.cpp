// What becomes of the sums of products (linear.cpp, quantized.cpp): scales, biases and what is fused with a product. Plain
// C ABI.
//
// A norm is in two products, of which neither waits for a row to be complete: the one before it adds up squares of its 64
// outputs, and leaves rows as they are; the one after it divides its own results by the rms.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elementwise.h"
#include "finish.h"

namespace {

// Arguments as calls.py lays them out.
struct FinishNorm {
  int32_t isa, threads, is_bf16;
  void* out;
  const void* x;
  int64_t rows, size;
  Fused norm;
};

#define QUIRE_OWN_WIDTH
#define QUIRE_KERNELS "finish.inl"
#include "isa.h"

}  // namespace

float row_scale(const Fused& a, int64_t row, int64_t size) {
  float total = 0;
  for (int64_t i = 0; i < a.num_squares; i++) total += a.squares[row * a.num_squares + i];
  return 1.0f / sqrtf(total / size + a.eps);
}

void finish_rows(int32_t isa, const Finish& a, const float* sums, int64_t top, int64_t rows, int64_t item) {
  QUIRE_CALL(isa, finish_rows(a, sums, top, rows, item));
}

extern "C" void quire_finish_norm(const void* args) {
  const FinishNorm& a = *(const FinishNorm*)args;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && a.rows * a.size >= PARALLEL_ELEMENTS)
  for (int64_t row = 0; row < a.rows; row++) {
    QUIRE_CALL(a.isa, finish_norm(a, row));
  }
}
