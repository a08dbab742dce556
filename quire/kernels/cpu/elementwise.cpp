// Norms, rotations and activations of rows on a CPU: float32 inside, float32 or bf16 outside. Plain C ABI.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elementwise.h"

namespace {

// Arguments as calls.py lays them out.
struct RmsNorm {
  int32_t isa, threads, is_bf16;
  void* out;
  const void *x, *weight;  // weight may be null
  int64_t rows, size, stride;
  float eps, offset;
};

struct AddNorm {
  int32_t isa, threads, is_bf16;
  void *total, *out;  // out is null where no norm follows
  const void *x, *residual, *weight;  // weight may be null
  int64_t rows, size, x_stride, residual_stride;
  float eps, offset;
};

struct NormRope {
  int32_t isa, threads, is_bf16;
  void* x;
  int64_t rows, num_heads, size, stride, half;
  const float* weight;  // [num_heads][size] or null
  const float *cos, *sin;  // [max_length][half]
  const int64_t* positions;
  float eps;
  int32_t interleaved;  // pairs lie side by side, not half apart
};

struct Embed {
  int32_t isa, threads, is_bf16;
  void* out;
  const void* table;  // rows, or a weight that linear.cpp packed: then `units` of a row
  const int64_t* ids;
  int64_t rows, size, units;
  int64_t first, count;  // the table's rows; every other is 0
  float scale;
};

#define QUIRE_OWN_WIDTH
#define QUIRE_KERNELS "elementwise.inl"
#include "isa.h"

}  // namespace

void activate_row(const Act& a, int64_t row) { QUIRE_CALL(a.isa, act(a, row)); }

// All take the address of their arguments, so that calls can be kept and made again (quire_replay).

extern "C" void quire_rms_norm(const void* args) {
  const RmsNorm& a = *(const RmsNorm*)args;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && a.rows * a.size >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < a.rows; r++) {
    QUIRE_CALL(a.isa, rms_norm(a, r));
  }
}

extern "C" void quire_add_norm(const void* args) {
  const AddNorm& a = *(const AddNorm*)args;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && a.rows * a.size >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < a.rows; r++) {
    QUIRE_CALL(a.isa, add_norm(a, r));
  }
}

extern "C" void quire_norm_rope(const void* args) {
  const NormRope& a = *(const NormRope*)args;
  const int64_t work = a.rows * a.num_heads * a.size;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && work >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < a.rows; r++) {
    QUIRE_CALL(a.isa, norm_rope(a, r));
  }
}

extern "C" void quire_act(const void* args) {
  const Act& a = *(const Act*)args;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && a.rows * a.size >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < a.rows; r++) {
    activate_row(a, r);
  }
}

extern "C" void quire_embed(const void* args) {
  const Embed& a = *(const Embed*)args;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && a.rows * a.size >= PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < a.rows; r++) {
    QUIRE_CALL(a.isa, embed(a, r));
  }
}
