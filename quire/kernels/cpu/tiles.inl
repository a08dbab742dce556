// Products of AMX's tiles: up to 32 rows of x by 64 columns of a packed weight.

#if QUIRE_ISA >= 4
constexpr int64_t TILE_ROWS = 16, TILE_UNITS = 16, TILE_BYTES = 1024;  // units of a row of x, rows of a weight

// Tiles 0 to 3 are sums, 4 and 5 rows of x (16 and up to 16 more), 6 and 7 columns of the weight.
static inline void configure_tiles(int64_t rows) {
  TileConfig config;
  const uint8_t first = rows < TILE_ROWS ? rows : TILE_ROWS, second = rows > TILE_ROWS ? rows - TILE_ROWS : first;
  const uint8_t counts[8] = {first, first, second, second, first, second, TILE_UNITS, TILE_UNITS};
  for (int i = 0; i < 8; i++) {
    config.column_bytes[i] = 64;
    config.rows[i] = counts[i];
  }
  use_tiles(config);
}

// Pairs of bf16; int8 by 128 + int8; int8 by int8. A macro, since a tile's number is part of an instruction's name.
#define QUIRE_TILES(sum, x, weight)           \
  if constexpr (KIND == BF16) {               \
    _tile_dpbf16ps(sum, x, weight);           \
  } else if constexpr (KIND == BYTES) {       \
    _tile_dpbsud(sum, x, weight);             \
  } else {                                    \
    _tile_dpbssd(sum, x, weight);             \
  }

// sums [rows][64] of `rows` of x, configured before, by `units` of 64 columns. Before 16 of these, of which it takes so many
// lines each from w on, ask(w, lines) asks for what is wanted later. Sums of bytes and nibbles are int32, as the bits of floats.
template <Kind KIND, class Ask>
static inline void tile_products(const char* x, int64_t x_stride, int64_t rows, const char* weight, int64_t units,
                                 float* sums, Ask ask) {
  const bool wide = rows > TILE_ROWS;  // all rows by half of the columns, then by the others; else by all columns at once
  finish_writes();
  for (int half = 0; half <= wide; half++) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t u = 0; u < units; u += TILE_UNITS) {
      const char* w = weight + half * 128 + u * BLOCK * 4;
      ask(w, wide ? 2 : 4);
      _tile_loadd(4, x + u * 4, x_stride);
      _tile_loadd(6, w, BLOCK * 4);
      QUIRE_TILES(0, 4, 6)
      _tile_loadd(7, w + 64, BLOCK * 4);
      QUIRE_TILES(1, 4, 7)
      if (wide) {
        _tile_loadd(5, x + TILE_ROWS * x_stride + u * 4, x_stride);
        QUIRE_TILES(2, 5, 6)
        QUIRE_TILES(3, 5, 7)
      } else {
        _tile_loadd(6, w + 128, BLOCK * 4);
        _tile_loadd(7, w + 192, BLOCK * 4);
        QUIRE_TILES(2, 4, 6)
        QUIRE_TILES(3, 4, 7)
      }
    }
    float* rest = wide ? sums + half * 32 + TILE_ROWS * BLOCK : sums + 32;
    _tile_stored(0, sums + half * 32, BLOCK * 4);
    _tile_stored(1, sums + half * 32 + 16, BLOCK * 4);
    _tile_stored(2, rest, BLOCK * 4);
    _tile_stored(3, rest + 16, BLOCK * 4);
  }
}

// sums [32][64], 32 of each row's, of two tiles of packed rows (linear.cpp), `steps` times 16 units each, by the same of 32
// columns, added to what is there unless it is the `first`.
template <Kind KIND>
static inline void panel_products(const char* x, const char* weight, int64_t steps, float* sums, bool first, Ahead& ahead_x,
                                  Ahead& ahead_weight) {
  float* rest = sums + TILE_ROWS * BLOCK;
  finish_writes();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, BLOCK * 4);
    _tile_loadd(1, sums + 16, BLOCK * 4);
    _tile_loadd(2, rest, BLOCK * 4);
    _tile_loadd(3, rest + 16, BLOCK * 4);
  }
  for (int64_t s = 0; s < steps; s++) {
    const char* w = weight + s * TILE_UNITS * BLOCK * 4;
    ahead_x.ask();
    ahead_weight.ask();
    _tile_loadd(4, x + s * TILE_BYTES, 64);
    _tile_loadd(6, w, BLOCK * 4);
    QUIRE_TILES(0, 4, 6)
    _tile_loadd(7, w + 64, BLOCK * 4);
    QUIRE_TILES(1, 4, 7)
    _tile_loadd(5, x + (steps + s) * TILE_BYTES, 64);
    QUIRE_TILES(2, 5, 6)
    QUIRE_TILES(3, 5, 7)
  }
  _tile_stored(0, sums, BLOCK * 4);
  _tile_stored(1, sums + 16, BLOCK * 4);
  _tile_stored(2, rest, BLOCK * 4);
  _tile_stored(3, rest + 16, BLOCK * 4);
}
#undef QUIRE_TILES
#endif
