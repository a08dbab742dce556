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

namespace {

constexpr int64_t BLOCK = 64;  // outputs
constexpr int64_t GROUP = 64;  // inputs with a scale of their own, of 4 bits
constexpr int64_t AHEAD_UNITS = 1024;  // 4 KiB
constexpr int64_t SERIAL_ROWS = 4;     // which one thread quantizes sooner than others wake up

struct Rows {
  int8_t* out;     // [rows, padded]
  float* scales;   // [rows]
  int32_t* sums;   // [rows], or [rows, padded / GROUP] where grouped
  const void* x;
  int64_t inputs, padded, x_stride_bytes;
  bool is_bf16, grouped;
};

struct Weight {
  void *packed, *scales;
  const void* weight;  // [outputs, inputs]
  int64_t outputs, inputs, padded;
  bool is_bf16;
};

struct Product {
  void* out;
  const int8_t* x;
  const float* x_scales;
  const int32_t *x_sums, *weight;
  const uint16_t* scales;
  const void* bias;  // may be null
  int64_t rows, outputs, padded;
  bool out_bf16, bias_bf16;
};

// Memory of a thread that calls, kept for its next call.
struct Scratch {
  char* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { free(memory); }
  char* of(int64_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + 63) / 64 * 64;
      memory = (char*)aligned_alloc(64, size);
      if (!memory) abort();  // as C++'s own allocation would
    }
    return memory;
  }
};

#define QUIRE_KERNELS "quantized.inl"
#include "isa.h"

}  // namespace

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

// In linear.cpp; `kind` 2 is bytes.
extern "C" void quire_linear(int32_t isa, int32_t threads, int32_t kind, int32_t out_bf16, int32_t bias_bf16, void* out,
                             const void* x, const void* weight, const void* bias, const float* x_scales,
                             const int32_t* x_sums, const float* weight_scales, int64_t rows, int64_t outputs,
                             int64_t units, int64_t x_stride_bytes, int64_t groups, int64_t x_group_bytes);

// x [rows, inputs] @ weight.T + bias: out [rows, outputs]. The bias is of x's type.
extern "C" void quire_linear_quantized(int32_t isa, int32_t threads, int32_t bits, int32_t is_bf16, int32_t out_bf16,
                                       void* out, const void* x, const void* weight, const void* scales,
                                       const void* bias, int64_t rows, int64_t inputs, int64_t outputs, int64_t padded,
                                       int64_t x_stride_bytes) {
  const bool grouped = bits == 4;
  const int64_t sums_per_row = grouped ? padded / GROUP : 1;
  static thread_local Scratch scratch;
  int8_t* whole = (int8_t*)scratch.of(rows * (padded + 4 + 4 * sums_per_row));
  float* x_scales = (float*)(whole + rows * padded);
  int32_t* x_sums = (int32_t*)(x_scales + rows);
  const Rows given{whole, x_scales, x_sums, x, inputs, padded, x_stride_bytes, is_bf16 != 0, grouped};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > SERIAL_ROWS)
  for (int64_t row = 0; row < rows; row++) QUIRE_CALL(isa, quantize_row(given, row));
  if (!grouped)
    return quire_linear(isa, threads, 2, out_bf16, is_bf16, out, whole, weight, bias, x_scales, x_sums,
                        (const float*)scales, rows, outputs, padded / 4, padded, 1, 0);
  const Product args{out,     whole,    x_scales, x_sums, (const int32_t*)weight, (const uint16_t*)scales, bias, rows,
                     outputs, padded, out_bf16 != 0, is_bf16 != 0};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) QUIRE_CALL(isa, nibble_block(args, block));
}
