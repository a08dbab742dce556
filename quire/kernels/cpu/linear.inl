// A matrix product with a packed weight, for one instruction set. See linear.cpp.

#include "products.inl"
#include "tiles.inl"

#if QUIRE_ISA >= 2
constexpr int LINEAR_ROWS = 6, LINEAR_SUMS = 24;  // registers of sums
#elif QUIRE_ISA == 1
constexpr int LINEAR_ROWS = 6, LINEAR_SUMS = 12;
#else
constexpr int LINEAR_ROWS = 2, LINEAR_SUMS = 8;
#endif

#if QUIRE_ISA >= 4
constexpr int64_t LEAST_TILE_ROWS = 7;  // of bytes; with fewer, vectors are as fast
#endif

#if QUIRE_ISA >= 3
// Four weights of 8 bits, 128 added, by four int8. Sums are int32, as the bits of floats: exact.
struct ByteUnits {
  static constexpr int WORDS = 1, HALVES = 1;
  static inline RegisterInts half(RegisterInts b, int) { return b; }
  static inline RegisterInts input(const int32_t* x, int) { return everywhere(*x); }
  static inline Register add(Register sum, RegisterInts b, RegisterInts x) {
    return (Register)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)x);
  }
};
#else
// Four weights of 8 bits, 128 added, the first and the third by a pair of int16, the others by another. Sums are int32, as
// the bits of floats: exact.
struct ByteUnits {
  static constexpr int WORDS = 2, HALVES = 2;
  static inline RegisterInts half(RegisterInts b, int h) { return (h ? b >> 8 : b) & 0x00ff00ff; }
  static inline RegisterInts input(const int32_t* x, int h) { return everywhere(x[h]); }
  static inline Register add(Register sum, RegisterInts b, RegisterInts x) {
    return (Register)add_shorts((RegisterInts)sum, b, x);
  }
};
#endif

// Rows row .. row + R - 1 of units unit .. unit + units - 1, added to sums [R][64]; asks on for what comes later, or, if the
// weight STREAMS, for what it takes itself soon. Not inlined: other loops would take its registers.
template <bool STREAMS, class E, int R>
__attribute__((noinline)) static void rows_of_block(const Linear& a, const int32_t* weight, float* sums, int64_t row,
                                                    int64_t unit, int64_t units, Ahead& later) {
  constexpr int COLUMNS = columns_of(R, LINEAR_SUMS);
  const int32_t *x[R], *columns[COLUMNS];
  Ahead ahead = later.of_columns(COLUMNS);
  for (int r = 0; r < R; r++)
    x[r] = (const int32_t*)((const char*)a.x + (row + r) * a.x_stride_bytes) + unit * E::WORDS;
  for (int64_t c = 0; c < BLOCK; c += COLUMNS * LANES) {
    for (int i = 0; i < COLUMNS; i++) columns[i] = weight + unit * BLOCK + c + i * LANES;
    Register part[R][COLUMNS * PARTS];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < COLUMNS * PARTS; p++)
        part[r][p] = unit ? load_register(sums + r * BLOCK + c + p * WIDTH) : Register{};
    products<E>(part, x, columns, units, BLOCK, [&](int64_t s) {
      if constexpr (STREAMS) {
#pragma GCC unroll 4
        for (const int32_t* column : columns) __builtin_prefetch(column + s * BLOCK + AHEAD_UNITS);
      } else {
        ahead.ask();
      }
    });
    for (int r = 0; r < R; r++)
      for (int p = 0; p < COLUMNS * PARTS; p++) store_register(sums + r * BLOCK + c + p * WIDTH, part[r][p]);
  }
  later.next = ahead.next;
}

// A piece of the weight stays in the first cache while all of up to 96 rows pass by, each of which asks for a share of the
// next one, so that memory is never idle. Few rows are done before a large piece would have come; if their sums of all
// columns fit into registers, they take the weight as it comes, in order.
template <class E>
static void sums_by_vectors(const Linear& a, int64_t block, int64_t top, int64_t rows, float* sums) {
  const int32_t* weight = (const int32_t*)a.weight + block * a.units * BLOCK;
  const int64_t chunks = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
  const bool many = chunks > 4, at_once = chunks == 1 && columns_of(rows, LINEAR_SUMS) * LANES == BLOCK;
  const bool unasked = ASKS_FAR || (FETCHES_AHEAD && rows == 1 && omp_get_num_threads() == 1);
  const bool streams = at_once && !top && !unasked;
  const int64_t piece = many ? PIECE_UNITS : at_once ? a.units : SMALL_PIECE_UNITS;
  for (int64_t unit = 0; unit < a.units; unit += piece) {
    const int64_t units = a.units - unit < piece ? a.units - unit : piece;
    const char* next = (const char*)(weight + (unit + piece) * BLOCK);
    const int64_t lines = top || at_once ? 0 : (BLOCK / LANES + chunks - 1) / chunks;
    Ahead later{next, lines, next + units * BLOCK * 4, many || !ASKS_FAR};
    for (int64_t r = 0; r < rows; r += LINEAR_ROWS) {
      const int64_t count = rows - r < LINEAR_ROWS ? rows - r : LINEAR_ROWS;
      with_rows<LINEAR_ROWS>(count, [&](auto n) {
        constexpr int R = decltype(n)::value;
        if (streams) {
          rows_of_block<true, E, R>(a, weight, sums + r * BLOCK, top + r, unit, units, later);
        } else {
          rows_of_block<false, E, R>(a, weight, sums + r * BLOCK, top + r, unit, units, later);
        }
      });
    }
  }
}

#if QUIRE_ISA >= 4
// The first rows take the block from memory, and ask for the lines of a half that follow those they take, so that memory is
// never idle. If others pass by, each asks for a share of the next block.
template <Kind KIND>
static void sums_by_tiles(const Linear& a, int64_t block, int64_t top, int64_t rows, float* sums) {
  constexpr int64_t AT_ONCE = 2 * TILE_ROWS;
  const int64_t block_bytes = a.units * BLOCK * 4, passes = (a.rows + AT_ONCE - 1) / AT_ONCE;
  const char *weight = (const char*)a.weight + block * block_bytes, *next = weight + block_bytes;
  const int64_t lines = passes > 1 && block_bytes <= MOST_BLOCK_AHEAD ? (2 * TILE_UNITS + passes - 1) / passes : 0;
  int64_t configured = 0;
  for (int64_t r = 0; r < rows; r += AT_ONCE) {
    const int64_t count = rows - r < AT_ONCE ? rows - r : AT_ONCE;
    const char* x = (const char*)a.x + (top + r) * a.x_stride_bytes;
    const bool first = top + r == 0;
    Ahead ahead{next + (top + r) / AT_ONCE * (a.units / TILE_UNITS * 2 * lines * 64), lines, next + block_bytes, true};
    if (count != configured) configure_tiles(configured = count);
    tile_products<KIND>(x, a.x_stride_bytes, count, weight, a.units, sums + r * BLOCK, [&](const char* w, int of_unit) {
      for (int i = 0; first && i < TILE_UNITS; i++)
        for (int line = 0; line < of_unit; line++) __builtin_prefetch(w + AHEAD_UNITS * 4 + i * BLOCK * 4 + line * 64);
      ahead.ask();
    });
  }
  _tile_release();
}

// Sums of up to PANEL_ROWS rows and MOST_PARTS blocks (finish.h), a set of them for each CHUNK_ROWS. A panel of a block's
// weight stays in the first cache while rows pass by, and one of x in the second while blocks do. The panels after them
// are on their way meanwhile, of the last ones those of the blocks that are `further` from these.
template <Kind KIND>
static void sums_of_kind(const Panels& a, int64_t top, int64_t rows, const int64_t* blocks, int64_t num_blocks,
                         int64_t further, float* sums) {
  const int64_t pairs = (rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  const int64_t x_lines = (2 * TILE_ROWS + 2 * num_blocks - 1) / (2 * num_blocks);
  const int64_t weight_lines = (2 * TILE_UNITS + pairs - 1) / pairs;
  const auto units_of = [&](int64_t unit) { return a.units - unit < PANEL_UNITS ? a.units - unit : PANEL_UNITS; };
  configure_tiles(2 * TILE_ROWS);
  for (int64_t unit = 0; unit < a.units; unit += PANEL_UNITS) {
    const int64_t units = units_of(unit), steps = units / TILE_UNITS;
    const bool is_last = unit + units == a.units;
    const int64_t then = is_last ? 0 : unit + units;
    const char* x = a.x + unit * 4 * a.padded_rows + top * units * 4;
    const char* next_x = a.x + then * 4 * a.padded_rows + top * units_of(then) * 4;
    Ahead ahead_x{next_x, x_lines, next_x + pairs * 2 * TILE_ROWS * units_of(then) * 4, false};
    for (int64_t b = 0; b < num_blocks; b++) {
      const int64_t next = blocks[b] + (is_last ? further : 0);
      const char* next_weight = a.weight + (next * a.units + then) * BLOCK * 4;
      Ahead ahead_weight{next_weight, weight_lines, next_weight + units_of(then) * BLOCK * 4, false};
      for (int64_t half = 0; half < 2; half++) {
        const char* weight = a.weight + (blocks[b] * a.units + unit) * BLOCK * 4 + half * 128;
        for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
          const int64_t chunk = row / CHUNK_ROWS * MOST_PARTS + b;
          float* to = sums + (chunk * CHUNK_ROWS + row % CHUNK_ROWS) * BLOCK + half * 32;
          panel_products<KIND>(x + row * units * 4, weight, steps, to, unit == 0, ahead_x, ahead_weight);
        }
      }
    }
  }
  _tile_release();
}

static void sums_by_panels(const Panels& a, Kind kind, int64_t top, int64_t rows, const int64_t* blocks,
                           int64_t num_blocks, int64_t further, float* sums) {
  kind == BF16 ? sums_of_kind<BF16>(a, top, rows, blocks, num_blocks, further, sums)
               : sums_of_kind<BYTES>(a, top, rows, blocks, num_blocks, further, sums);
}
#endif

// A row of `count` numbers as products take it, with zeros up to `padded`.
static inline void prepare_row(int32_t kind, void* out, const void* x, int64_t count, int64_t padded) {
  if (QUIRE_ISA < 3 && kind == BF16) {
    float* to = (float*)out;
    FOR_LANES(i, n, count) { put(to + i, get((const Bf16*)x + i, n), n); }
    memset(to + count, 0, (padded - count) * 4);
  } else {
    const int64_t size = kind == BF16 ? 2 : 4;
    memcpy(out, x, count * size);
    memset((char*)out + count * size, 0, (padded - count) * size);
  }
}

// 64 outputs of rows top .. top + rows - 1, not finished: sums [rows][64].
static void linear_sums(const Linear& a, int64_t block, int64_t top, int64_t rows, float* sums) {
  const Kind kind = a.finish.kind;
#if QUIRE_ISA >= 4
  if (kind == BF16) return sums_by_tiles<BF16>(a, block, top, rows, sums);
  if (kind == BYTES && a.rows >= LEAST_TILE_ROWS) return sums_by_tiles<BYTES>(a, block, top, rows, sums);
#endif
  if (kind == BF16) {
    sums_by_vectors<Bf16Units>(a, block, top, rows, sums);
  } else if (kind == BYTES) {
    sums_by_vectors<ByteUnits>(a, block, top, rows, sums);
  } else {
    sums_by_vectors<FloatUnits>(a, block, top, rows, sums);
  }
}
