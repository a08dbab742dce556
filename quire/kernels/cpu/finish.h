// How sums of products become results (finish.cpp), for linear.cpp, quantized.cpp and experts.cpp.
#pragma once
#include <cstdint>

#include "cache.h"

constexpr int64_t BLOCK = 64;       // outputs
constexpr int64_t CHUNK_ROWS = 96;  // whose sums are kept until they are finished
constexpr int64_t MOST_PARTS = 4;   // blocks that are finished together
constexpr int64_t MOST_SUMS = MOST_PARTS * CHUNK_ROWS * BLOCK;

enum Kind : int32_t { FLOATS = 0, BF16 = 1, BYTES = 2, NIBBLES = 3 };

// What becomes of a product whose outputs are heads: queries, then as many keys as values. Queries and keys are normalised
// and rotated, keys and values stored. Mirrored in quire/attention/cpu.py.
struct Heads {
  const Cache* cache;
  const int64_t *slots, *positions;  // [rows]
  const float* weights;              // [queries and keys][size] or null: no norm
  const float *cos, *sin;            // [max_length][half]
  int64_t num_queries, size, half;
  float eps;
  int32_t interleaved;
};

// What a call does besides a product, as calls.py lays it out. Null: not.
struct Fused {
  const float* squares;  // [rows][num_squares]: rows are a norm's results that are to be divided by its rms
  const void* residual;  // [rows][outputs], to which results are added
  void* total;           // [rows][outputs], as precise as the residual: the sums; and out becomes their norm, not divided
  float* new_squares;    // [rows][outputs / 64]: of the total
  const void* gain;      // [outputs] of out's type: that norm's weight, if it has one
  const Heads* heads;    // out [rows][queries] has those
  int64_t num_squares, residual_stride;
  float eps, offset;     // of the norm before; of the weight of the one that follows
  int32_t residual_bf16;
  int32_t gated, activation;  // the first half of outputs are gates: out [rows][outputs / 2] is act(gate) * up
};

// 1 / rms of a row of `size` numbers.
float row_scale(const Fused& a, int64_t row, int64_t size);

inline int64_t results_per_row(const Fused& a, int64_t outputs) {
  return a.heads ? a.heads->num_queries * a.heads->size : outputs >> a.gated;
}

struct Finish {
  void* out;         // [rows], `out_stride` numbers from one to the next
  const void* bias;  // may be null
  const float *x_scales, *weight_scales;  // of rows, or null; of outputs, if sums are of BYTES
  const int32_t* x_sums;                  // of BYTES
  int64_t outputs, out_stride;
  Kind kind;  // sums of BYTES are int32, as the bits of floats
  bool out_bf16, bias_bf16;
  Fused fused;

  // An item is a block, or a head, or a block of gates with that of their ups.
  int64_t parts() const { return fused.heads ? fused.heads->size / BLOCK : fused.gated ? 2 : 1; }
  int64_t items() const { return (outputs + BLOCK - 1) / BLOCK / parts(); }
  int64_t block(int64_t item, int64_t part) const {
    return fused.heads ? item * parts() + part : item + part * items();
  }
};

// Rows top .. top + rows - 1 of an item, of whose products there are sums [parts][CHUNK_ROWS][64]. Apart from where those
// are computed, so that it costs them no registers, and rounds alike wherever it is called.
void finish_rows(int32_t isa, const Finish& a, const float* sums, int64_t top, int64_t rows, int64_t item);

// All `rows` of an item: add_up(block, top, count, sums) computes sums of one of its blocks.
template <class AddUp>
inline void finish_item(int32_t isa, const Finish& a, int64_t rows, int64_t item, float* sums, AddUp add_up) {
  for (int64_t top = 0; top < rows; top += CHUNK_ROWS) {
    const int64_t count = rows - top < CHUNK_ROWS ? rows - top : CHUNK_ROWS;
    for (int64_t part = 0; part < a.parts(); part++)
      add_up(a.block(item, part), top, count, sums + part * CHUNK_ROWS * BLOCK);
    finish_rows(isa, a, sums, top, count, item);
  }
}
