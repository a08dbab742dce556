// Weights of 8 and 4 bits, made from floats or bf16, and rows of int8 to multiply them with. Plain C ABI.
//
//   8 bits  [outputs / 64][inputs / 4][64] units of 4 bytes, each 128 + an integer from -127 to 127; a scale per output
//   4 bits  [outputs / 64][inputs / 8][64] units of 8 numbers, each 8 + an integer from -8 to 7: byte i holds input i
//           below and input 4 + i above; scales [outputs / 64][inputs / 64][64] bf16, one per 64 inputs of an output
//   rows    int8 from -127 to 127, a scale per row, and sums of the integers: of the row, or of each 64 inputs
// A weight of 8 bits is multiplied by linear.cpp. Products are summed up exactly as int32, those of 64 inputs with 4 bits;
// the rest is float32 in the order of the inputs: the same bits however many rows there are.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "linear.h"
#include "quantized.h"
#include "scratch.h"

namespace {

constexpr int64_t AHEAD_UNITS = 2048;  // 8 KiB
constexpr int64_t SERIAL_ROWS = 4;     // which one thread quantizes sooner than others wake up

struct Weight {
  void *packed, *scales;
  const void* weight;  // [outputs, inputs]
  int64_t outputs, inputs, padded;
  bool is_bf16;
};

#define QUIRE_KERNELS "quantized.inl"
#include "isa.h"

}  // namespace

void quantize_row(int32_t isa, const Rows& a, int64_t row) { QUIRE_CALL(isa, quantize_row(a, row)); }

void nibble_item(int32_t isa, const Product& a, int64_t item, float* sums) {
  finish_item(isa, a.finish, a.rows, item, sums, [&](int64_t block, int64_t top, int64_t rows, float* sums) {
    QUIRE_CALL(isa, nibble_sums(a, block, top, rows, sums));
  });
}

// `bits` is 8 or 4.
extern "C" void quire_quantize_weight(int32_t isa, int32_t threads, int32_t is_bf16, int32_t bits, void* packed,
                                      void* scales, const void* weight, int64_t outputs, int64_t inputs,
                                      int64_t padded) {
  const Weight args{packed, scales, weight, outputs, inputs, padded, is_bf16 != 0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) {
    if (bits == 8) {
      QUIRE_CALL(isa, pack_bytes(args, block));
    } else {
      QUIRE_CALL(isa, pack_nibbles(args, block));
    }
  }
}

// x [rows, inputs] @ weight.T + bias: out [rows, outputs]. The bias is of x's type.
struct QuantizedCall {
  int32_t isa, threads, bits, is_bf16, out_bf16;
  void* out;
  const void *x, *weight, *scales, *bias;
  int64_t rows, inputs, outputs, padded, x_stride_bytes;
  Fused fused;
};

extern "C" void quire_linear_quantized(const void* args) {
  QuantizedCall a = *(const QuantizedCall*)args;
  const bool grouped = a.bits == 4;
  const int64_t sums_per_row = grouped ? a.padded / GROUP : 1;
  const int64_t row_bytes = a.padded * (grouped ? 1 : prepared_bytes(a.isa, BYTES));
  static thread_local Scratch scratch;
  char* whole = scratch.of(a.rows * (row_bytes + 4 + 4 * sums_per_row));
  float* x_scales = (float*)(whole + a.rows * row_bytes);
  int32_t* x_sums = (int32_t*)(x_scales + a.rows);
  const Rows given{whole, x_scales, x_sums, a.x, a.inputs, a.padded, a.x_stride_bytes, a.is_bf16 != 0, grouped};
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > SERIAL_ROWS)
  for (int64_t row = 0; row < a.rows; row++) {
    quantize_row(a.isa, given, row);
    if (a.fused.squares) x_scales[row] *= row_scale(a.fused, row, a.inputs);
  }
  a.fused.squares = nullptr;  // they are in the scales
  if (!grouped) {
    const LinearCall bytes{a.isa, a.threads, BYTES, a.out_bf16, a.is_bf16, a.out, whole, a.weight, a.bias, x_scales, x_sums,
                           (const float*)a.scales, a.rows, a.outputs, a.padded / 4, row_bytes, 1, 0, row_bytes, a.fused};
    return quire_linear(&bytes);
  }
  const Finish finish{a.out, a.bias, x_scales, nullptr, nullptr, a.outputs,
                      results_per_row(a.fused, a.outputs), NIBBLES, a.out_bf16 != 0, a.is_bf16 != 0, a.fused};
  const Product product{(const int8_t*)whole, x_sums, (const int32_t*)a.weight, (const uint16_t*)a.scales,
                        a.rows, a.padded, finish};
#pragma omp parallel num_threads(a.threads)
  {
    alignas(64) float sums[MOST_SUMS];
#pragma omp for schedule(guided)
    for (int64_t item = 0; item < finish.items(); item++) nibble_item(a.isa, product, item, sums);
  }
}
