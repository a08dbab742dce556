// x @ weight.T + bias on a CPU, with a weight packed so that it streams once, in order. Plain C ABI.
//
//   packed weight  [groups][outputs / 64][units][64] units of 4 bytes: a float, two bf16 that follow each other in a row,
//                  or four bytes (quantized.cpp).
// A group (a head) has a weight, inputs and outputs of its own; usually there is one. Outputs are padded to 64 and
// inputs to 32 with zeros, bytes to 64. Lanes are outputs, so there are no reductions, and a row's result is a sum in the
// order of the inputs: the same bits however many rows there are, and on however many threads. Inputs are widened first to
// what the machine multiplies: bf16 to float, and int8 to int16, where it has no products of them.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "linear.h"
#include "scratch.h"

namespace {

constexpr int64_t PIECE_UNITS = 128, SMALL_PIECE_UNITS = 32;  // 32 and 8 KiB of the weight
constexpr int64_t AHEAD_UNITS = 1024;  // 4 KiB
constexpr int64_t MOST_BLOCK_AHEAD = 1 << 19;  // bytes that the second cache takes beside those that are multiplied
constexpr int64_t SERIAL_ROWS = 16;            // which one thread copies sooner than others wake up

// Of an x that does not fit into the second cache beside what else is there, tiles of rows follow each other in memory, and
// are read once for several blocks: [units / PANEL_UNITS][padded_rows / 16][PANEL_UNITS / 16][16 rows][16 units]. The last
// panel may have fewer units. Half of a block's columns lie in half of the first cache's sets, of which 128 units take 8 ways.
constexpr int64_t PANEL_UNITS = 128;
constexpr int64_t PANEL_ROWS = 6 * CHUNK_ROWS;  // computed together
constexpr int64_t LEAST_PANEL_BYTES = 5 << 18;

struct Panels {
  const char *x, *weight;
  int64_t padded_rows, units;
};

#define QUIRE_KERNELS "linear.inl"
#include "isa.h"

template <class T>
void pack_block(const T* weight, T* packed, int64_t block, int64_t outputs, int64_t inputs, int64_t units) {
  constexpr int64_t PER_UNIT = 4 / sizeof(T);
  T* to = packed + block * units * BLOCK * PER_UNIT;
  if ((block + 1) * BLOCK <= outputs && inputs == units * PER_UNIT) {  // nothing to pad: move whole units
    const int32_t* from = (const int32_t*)(weight + block * BLOCK * inputs);
    for (int64_t u = 0; u < units; u += 16)
      for (int64_t i = 0; i < BLOCK; i++)
        for (int64_t k = u; k < u + 16; k++) ((int32_t*)to)[k * BLOCK + i] = from[i * units + k];
    return;
  }
  for (int64_t i = 0; i < BLOCK; i++) {
    const int64_t row = block * BLOCK + i;
    for (int64_t k = 0; k < units * PER_UNIT; k++)
      to[(k / PER_UNIT * BLOCK + i) * PER_UNIT + k % PER_UNIT] =
          row < outputs && k < inputs ? weight[row * inputs + k] : T{};
  }
}

// Has the rows of x as products take them, in this thread's memory.
void prepare(LinearCall& a) {
  static thread_local Scratch scratch;
  const int64_t count = a.groups * a.rows, size = a.kind == BF16 ? 2 : 4, padded = a.units * 4 / size;
  const int64_t bytes = padded * prepared_bytes(a.isa, (Kind)a.kind), inputs = a.x_row_bytes / size;
  char* rows = scratch.of(count * bytes);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (count > SERIAL_ROWS)
  for (int64_t i = 0; i < count; i++) {
    const char* x = (const char*)a.x + i / a.rows * a.x_group_bytes + i % a.rows * a.x_stride_bytes;
    prepare_row(a.isa, a.kind, rows + i * bytes, x, inputs, padded);
  }
  a.x = rows;
  a.x_stride_bytes = bytes;
  a.x_group_bytes = a.rows * bytes;
}

const float* inverses(const Fused& fused, int64_t rows, int64_t size, Scratch& scratch) {
  float* found = (float*)scratch.of(rows * sizeof(float));
  for (int64_t row = 0; row < rows; row++) found[row] = row_scale(fused, row, size);
  return found;
}

#ifdef QUIRE_X86
bool wants_panels(const LinearCall& a) {
  return a.isa >= AMX && a.kind != FLOATS && a.groups == 1 && a.rows * a.units * 4 >= LEAST_PANEL_BYTES;
}

// Rows top .. top + 15 of x as panels have them, with zeros past the end of each; past the last row, that one again.
void pack_tile(const LinearCall& a, char* packed, int64_t padded_rows, int64_t top) {
  for (int64_t unit = 0; unit < a.units; unit += 16) {
    const int64_t panel = unit / PANEL_UNITS * PANEL_UNITS;
    const int64_t units = a.units - panel < PANEL_UNITS ? a.units - panel : PANEL_UNITS;
    char* tile = packed + panel * 4 * padded_rows + top * units * 4 + (unit - panel) * 64;
    const int64_t left = a.x_row_bytes - unit * 4, there = left < 0 ? 0 : left < 64 ? left : 64;
    for (int64_t r = 0; r < 16; r++) {
      const int64_t row = top + r < a.rows ? top + r : a.rows - 1;
      memcpy(tile + r * 64, (const char*)a.x + row * a.x_stride_bytes + unit * 4, there);
      memset(tile + r * 64 + there, 0, 64 - there);
    }
  }
}

// Items that are computed together: as many as there is room for, unless threads would share them unevenly.
int64_t items_together(const Finish& finish, int64_t threads) {
  int64_t count = MOST_PARTS / finish.parts();
  while (count > 1 && finish.items() < 4 * count * threads) count /= 2;
  return count;
}

void linear_by_panels(const LinearCall& a, const Finish& finish) {
  static thread_local Scratch packed;
  const int64_t padded_rows = (a.rows + 31) / 32 * 32, parts = finish.parts();
  const Panels panels{packed.of(padded_rows * a.units * 4), (const char*)a.weight, padded_rows, a.units};
  const int64_t together = items_together(finish, a.threads);
  const int64_t stripes = (finish.items() + together - 1) / together, tops = (a.rows + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local Scratch scratch;
    float* sums = (float*)scratch.of(PANEL_ROWS / CHUNK_ROWS * MOST_SUMS * sizeof(float));
#pragma omp for schedule(static)
    for (int64_t top = 0; top < padded_rows; top += 16) pack_tile(a, (char*)panels.x, padded_rows, top);
#pragma omp for schedule(guided)
    for (int64_t i = 0; i < stripes * tops; i++) {
      const int64_t first = i / tops * together, top = i % tops * PANEL_ROWS;
      const int64_t last = first + together < finish.items() ? first + together : finish.items();
      const int64_t rows = a.rows - top < PANEL_ROWS ? a.rows - top : PANEL_ROWS, num_blocks = (last - first) * parts;
      int64_t blocks[MOST_PARTS];
      for (int64_t b = 0; b < num_blocks; b++) blocks[b] = finish.block(first + b / parts, b % parts);
      const int64_t further = tops == 1 ? finish.block(together, 0) : 0;
      amx::sums_by_panels(panels, finish.kind, top, rows, blocks, num_blocks, further, sums);
      for (int64_t row = 0; row < rows; row += CHUNK_ROWS)
        for (int64_t item = first; item < last; item++) {
          const int64_t set = row / CHUNK_ROWS * MOST_PARTS + (item - first) * parts;
          const int64_t count = rows - row < CHUNK_ROWS ? rows - row : CHUNK_ROWS;
          finish_rows(a.isa, finish, sums + set * CHUNK_ROWS * BLOCK, top + row, count, item);
        }
    }
  }
}
#endif

}  // namespace

void linear_item(int32_t isa, const Linear& a, int64_t item, float* sums) {
  finish_item(isa, a.finish, a.rows, item, sums, [&](int64_t block, int64_t top, int64_t rows, float* sums) {
    QUIRE_CALL(isa, linear_sums(a, block, top, rows, sums));
  });
}

void prepare_row(int32_t isa, int32_t kind, void* out, const void* x, int64_t count, int64_t padded) {
  QUIRE_CALL(isa, prepare_row(kind, out, x, count, padded));
}

extern "C" void quire_pack_linear(int32_t threads, int32_t is_bf16, const void* weight, void* packed,
                                  int64_t outputs, int64_t inputs, int64_t units, int64_t groups) {
  const int64_t blocks = (outputs + BLOCK - 1) / BLOCK, size = outputs * inputs, packed_size = blocks * units * BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < groups * blocks; i++) {
    const int64_t group = i / blocks, block = i % blocks;
    if (is_bf16) {
      uint16_t* to = (uint16_t*)packed + group * packed_size * 2;
      pack_block((const uint16_t*)weight + group * size, to, block, outputs, inputs, units);
    } else {
      float* to = (float*)packed + group * packed_size;
      pack_block((const float*)weight + group * size, to, block, outputs, inputs, units);
    }
  }
}

extern "C" void quire_linear(const void* args) {
  LinearCall a = *(const LinearCall*)args;
  const Kind kind = (Kind)a.kind;
  const int64_t size = kind == BF16 ? 2 : 4;
  const bool widened = kind == BF16 && prepared_bytes(a.isa, BF16) > 2;
  static thread_local Scratch scratch;
  if (a.fused.squares) a.x_scales = inverses(a.fused, a.rows, a.x_row_bytes / size, scratch);
#ifdef QUIRE_X86
  const bool by_panels = wants_panels(a);
#else
  const bool by_panels = false;
#endif
  if (!by_panels && (widened || a.x_row_bytes < a.units * 4)) prepare(a);
  const int64_t blocks = (a.outputs + BLOCK - 1) / BLOCK, out_bytes = a.out_bf16 ? 2 : 4;
  const Finish finish{a.out, a.bias, a.x_scales, a.weight_scales, a.x_sums, a.outputs,
                      a.groups * results_per_row(a.fused, a.outputs), kind, a.out_bf16 != 0, a.bias_bf16 != 0, a.fused};
#ifdef QUIRE_X86
  if (by_panels) return linear_by_panels(a, finish);
#endif
#pragma omp parallel num_threads(a.threads) if (a.groups * blocks > 1)
  {
    alignas(64) float sums[MOST_SUMS];
#pragma omp for schedule(guided)
    for (int64_t i = 0; i < a.groups * finish.items(); i++) {
      const int64_t group = i / finish.items();
      Linear one{(const char*)a.x + group * a.x_group_bytes,
                 (const char*)a.weight + group * blocks * a.units * BLOCK * 4,
                 a.rows, a.units, a.x_stride_bytes, finish};
      one.finish.out = (char*)a.out + group * a.outputs * out_bytes;
      linear_item(a.isa, one, i % finish.items(), sums);
    }
  }
}
