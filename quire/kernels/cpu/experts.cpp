// Sparse experts on a CPU: which experts a token goes to, and what becomes of it there. Plain C ABI.
//
// A pair is a token and one of its experts. Pairs lie expert by expert, so that those of an expert are the rows of a
// product, and they come in pieces, only so that their memory has a limit:
//
//   x [tokens] ──> rows [pairs] ──up──> act ──> rows [pairs] ──down──> parts [pairs] ──> totals [tokens] ──> out
//
// Threads share out the blocks of all experts' products, so that one token keeps all of them busy. A token's parts are
// added in the order of its experts: the same bits whatever else is in the batch.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elementwise.h"
#include "linear.h"
#include "quantized.h"
#include "scratch.h"

namespace {

constexpr int64_t INPUT_STEP = 32;            // as in linear.cpp
constexpr int64_t PIECE_BYTES = 64 << 20;     // of a piece of pairs
constexpr int64_t PARALLEL_SCORES = 32768;    // fewer are looked through before other threads would have begun

enum Score : int32_t { SOFTMAX = 0, SIGMOIDS = 1, SOFTMAX_CHOSEN = 2 };  // as in experts.py

struct Route {
  int32_t isa, threads, score, renorm;
  int32_t* experts;  // [rows][top_k]
  float* weights;    // [rows][top_k]
  const float *logits, *correction;  // [rows] and [num_experts]; the latter may be null
  int64_t rows, num_experts, stride, top_k, groups, top_groups;
  float scale;
};

// A weight of each expert, all alike.
struct Weights {
  const int64_t *data, *scales;  // [experts] addresses; scales of quantized ones only
  const void* bias;              // [experts][outputs] or null
};

struct ExpertsCall {
  int32_t isa, threads, is_bf16, bits, kind, gated;  // bits of quantized weights, or 0; the activation
  void* out;
  const void* x;
  const int32_t* experts;     // [rows][top_k]
  const float* weights;       // [rows][top_k]
  const void *shared, *gate;  // [rows][dim] and [rows], or null
  Weights up, down;
  int64_t rows, top_k, num_experts, dim, hidden, x_stride, shared_stride;
};

// How a piece of pairs is added to its tokens' sums.
struct Sums {
  void* out;
  float* totals;  // [tokens][dim], between pieces
  const void *parts, *shared, *gate;
  const int32_t* places;  // [tokens][top_k]: which pairs are a token's, by expert
  const float* weights;   // [pairs]
  int64_t first, count, top_k, dim, shared_stride;
  bool last, is_bf16;
};

#define QUIRE_OWN_WIDTH
#define QUIRE_KERNELS "experts.inl"
#include "isa.h"

// Rows of a piece that belong to one expert.
struct Run {
  int64_t expert, first, count;
};

// One of an expert's two products: its weight, and the rows of a piece that it is multiplied with.
struct Side {
  const Weights* weights;
  int64_t inputs, outputs, padded;
  char* rows;  // [pairs][padded], in x's type or int8
  float* scales;
  int32_t* sums;
  char* out;  // [pairs][outputs], in x's type
};

struct Mixture {
  int32_t *tokens, *places;  // of pairs; and which pairs are a token's
  float *weights, *totals;
  int64_t* starts;  // [experts + 1]: pairs
  Run* runs;
  int64_t piece, num_runs;  // the former in pairs
  Side up, down;
  char* hidden;  // [pairs][hidden], before it is prepared
};

struct Room {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* p = (T*)next;
    next += (count * (int64_t)sizeof(T) + 63) & ~(int64_t)63;
    return p;
  }
};

int64_t padded(const ExpertsCall& a, int64_t inputs) {
  const int64_t step = a.bits ? GROUP : INPUT_STEP;
  return (inputs + step - 1) / step * step;
}

// Bytes of a number of a row that goes into products.
int64_t input_bytes(const ExpertsCall& a) {
  return a.bits == 4 ? 1 : prepared_bytes(a.isa, a.bits ? BYTES : a.is_bf16 ? BF16 : FLOATS);
}

Side lay_out(const ExpertsCall& a, const Weights& weights, int64_t inputs, int64_t outputs, int64_t pairs, Room& room) {
  const int64_t size = a.is_bf16 ? 2 : 4, length = padded(a, inputs), scales = a.bits ? pairs : 0;
  char* rows = room.take<char>(pairs * length * input_bytes(a));
  float* row_scales = room.take<float>(scales);
  int32_t* sums = room.take<int32_t>(a.bits == 4 ? scales * (length / GROUP) : scales);
  return {&weights, inputs, outputs, length, rows, row_scales, sums, room.take<char>(pairs * outputs * size)};
}

// Where everything lies from `memory` on, which may be null: only to see how much it takes.
Mixture lay_out(const ExpertsCall& a, Room& room) {
  const int64_t pairs = a.rows * a.top_k, ups = a.hidden << a.gated, size = a.is_bf16 ? 2 : 4;
  const int64_t pair_bytes = (padded(a, a.dim) + ups + 2 * padded(a, a.hidden) + a.dim) * size;
  Mixture m;
  m.piece = PIECE_BYTES / pair_bytes < 1 ? 1 : PIECE_BYTES / pair_bytes;
  if (m.piece > pairs) m.piece = pairs;
  m.tokens = room.take<int32_t>(pairs);
  m.places = room.take<int32_t>(pairs);
  m.weights = room.take<float>(pairs);
  m.starts = room.take<int64_t>(a.num_experts + 1);
  m.runs = room.take<Run>(a.num_experts);
  m.totals = room.take<float>(m.piece < pairs ? a.rows * a.dim : 0);
  m.up = lay_out(a, a.up, a.dim, ups, m.piece, room);
  m.down = lay_out(a, a.down, a.hidden, a.dim, m.piece, room);
  m.hidden = room.take<char>(m.piece * a.hidden * size);
  return m;
}

// Sorts pairs by expert, those of an expert by token.
void arrange(const ExpertsCall& a, const Mixture& m) {
  const int64_t pairs = a.rows * a.top_k;
  memset(m.starts, 0, (a.num_experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < pairs; i++) m.starts[a.experts[i] + 1]++;
  for (int64_t e = 0; e < a.num_experts; e++) m.starts[e + 1] += m.starts[e];
  for (int64_t i = 0; i < pairs; i++) {
    const int64_t place = m.starts[a.experts[i]]++;
    m.tokens[place] = i / a.top_k;
    m.weights[place] = a.weights[i];
    int64_t at = i;  // a token's places rise
    for (; at % a.top_k && m.places[at - 1] > place; at--) m.places[at] = m.places[at - 1];
    m.places[at] = place;
  }
  for (int64_t e = a.num_experts; e > 0; e--) m.starts[e] = m.starts[e - 1];
  m.starts[0] = 0;
}

int64_t find_runs(const ExpertsCall& a, const Mixture& m, int64_t first, int64_t count) {
  int64_t found = 0;
  for (int64_t e = 0; e < a.num_experts; e++) {
    const int64_t begin = m.starts[e] > first ? m.starts[e] : first;
    const int64_t end = m.starts[e + 1] < first + count ? m.starts[e + 1] : first + count;
    if (begin < end) m.runs[found++] = {e, begin - first, end - begin};
  }
  return found;
}

// 64 outputs of an expert's rows.
void multiply(const ExpertsCall& a, const Side& side, const Run& run, int64_t block, float* sums) {
  const int64_t size = a.is_bf16 ? 2 : 4, at = run.first, row_bytes = side.padded * input_bytes(a);
  const bool bf16 = a.is_bf16 != 0;
  const void* weight = (const void*)side.weights->data[run.expert];
  const void* scales = a.bits ? (const void*)side.weights->scales[run.expert] : nullptr;
  const char* bias = (const char*)side.weights->bias;
  if (bias) bias += run.expert * side.outputs * size;
  const Kind kind = a.bits == 4 ? NIBBLES : a.bits ? BYTES : bf16 ? BF16 : FLOATS;
  const Finish finish{side.out + at * side.outputs * size, bias, a.bits ? side.scales + at : nullptr, (const float*)scales,
                      side.sums + at, side.outputs, side.outputs, kind, bf16, bf16, Fused{}};
  const char* rows = side.rows + at * row_bytes;
  if (a.bits == 4) {
    const int32_t* x_sums = side.sums + at * (side.padded / GROUP);
    const Product product{(const int8_t*)rows, x_sums, (const int32_t*)weight, (const uint16_t*)scales,
                          run.count, side.padded, finish};
    return nibble_item(a.isa, product, block, sums);
  }
  const Linear one{rows, weight, run.count, side.padded * (a.bits ? 1 : size) / 4, row_bytes, finish};
  linear_item(a.isa, one, block, sums);
}

// All outputs of all experts' rows; called by all threads together.
void multiply_all(const ExpertsCall& a, const Mixture& m, const Side& side) {
  alignas(64) float sums[MOST_SUMS];
  const int64_t blocks = (side.outputs + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < m.num_runs * blocks; i++) multiply(a, side, m.runs[i / blocks], i % blocks, sums);
}

// A row that goes into products: `x` is that of `given`.
void prepare(const ExpertsCall& a, const Side& side, const Rows& given, int64_t row) {
  if (a.bits) return quantize_row(a.isa, given, row);
  const char* x = (const char*)given.x + (given.of ? given.of[row] : row) * given.x_stride_bytes;
  char* to = side.rows + row * side.padded * input_bytes(a);
  prepare_row(a.isa, a.is_bf16 ? BF16 : FLOATS, to, x, side.inputs, side.padded);
}

// What becomes of `count` pairs from `first` on.
void compute_piece(const ExpertsCall& a, const Mixture& m, int64_t first, int64_t count) {
  const int64_t size = a.is_bf16 ? 2 : 4;
  const bool bf16 = a.is_bf16 != 0, grouped = a.bits == 4, last = first + count == a.rows * a.top_k;
  const Rows given{m.up.rows, m.up.scales, m.up.sums, a.x, a.dim, m.up.padded, a.x_stride * size,
                   bf16, grouped, m.tokens + first};
  const Rows hidden{m.down.rows, m.down.scales, m.down.sums, m.hidden, a.hidden, m.down.padded,
                    a.hidden * size, bf16, grouped};
  const Act act{a.isa, 1, a.is_bf16, m.hidden, m.up.out, count, a.hidden, a.hidden, a.kind, a.gated};
  const Sums sums{a.out, m.totals, m.down.out, a.shared, a.gate, m.places, m.weights, first, count,
                  a.top_k, a.dim, a.shared_stride, last, bf16};
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; row++) prepare(a, m.up, given, row);
    multiply_all(a, m, m.up);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; row++) {
      activate_row(act, row);
      prepare(a, m.down, hidden, row);
    }
    multiply_all(a, m, m.down);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a.rows; token++) QUIRE_CALL(a.isa, add_pairs(sums, token));
  }
}

}  // namespace

extern "C" void quire_route(const void* args) {
  const Route& a = *(const Route*)args;
  const bool parallel = a.rows > 1 && a.rows * a.num_experts >= PARALLEL_SCORES;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (parallel)
  for (int64_t row = 0; row < a.rows; row++) {
    static thread_local Scratch scratch;
    float* memory = (float*)scratch.of(a.num_experts * 16);
    QUIRE_CALL(a.isa, route(a, row, memory));
  }
}

extern "C" void quire_experts(const void* args) {
  const ExpertsCall& a = *(const ExpertsCall*)args;
  const int64_t pairs = a.rows * a.top_k;
  if (!pairs) return;
  static thread_local Scratch scratch;
  Room room{nullptr};
  lay_out(a, room);
  room.next = scratch.of((int64_t)room.next);
  Mixture m = lay_out(a, room);
  arrange(a, m);
  for (int64_t first = 0; first < pairs; first += m.piece) {
    const int64_t count = pairs - first < m.piece ? pairs - first : m.piece;
    m.num_runs = find_runs(a, m, first, count);
    compute_piece(a, m, first, count);
  }
}
