// Attention over pages of 16 tokens, for one instruction set. See attention.cpp for the layout.

#include "products.inl"
#include "pages.inl"

constexpr int PAGES = TILE / LANES;
constexpr int ROWS = QUIRE_ISA >= 1 ? 4 : 2, SUMS = QUIRE_ISA >= 2 ? 16 : 8;  // of a block of sums, in registers

constexpr float LOWEST = -1e30f;

static inline void ask(const void* memory, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) ask_for_line((const char*)memory + i, !ASKS_FAR);
}

#if QUIRE_ISA >= 3
typedef Bf16Units WidenedUnits;
#else
// Without products of bf16, what int8 becomes for bf16 queries is multiplied as floats, which need not be taken apart.
typedef FloatUnits WidenedUnits;
#endif

// E: units of products. Number: of queries and results.
template <class E, class Number>
struct Task {
  typedef typename E::Element Element;
  typedef typename E::Input Input;
  const Cache& cache;
  const Step& step;
  const Query& query;
  const Item& item;
  const Item* following;  // whose first keys are asked for during the last tile; null: none
  char* memory;

  int64_t rows, k_units, v_stored, first, begin, end;
  int64_t step_bytes;  // of 16 units in the cache
  int32_t *q, *weights, *k_tile, *v_tile, *v_last;
  float *acc, *scores, *most, *rescale;  // of a span; then of all spans before
  Floats* total;
  float *all_acc, *all_most;
  Floats* all_total;
  int64_t *limit, *low;
  const int32_t *k_page[PAGES], *v_page[PAGES];
  const int32_t *soon[PAGES], *next_page[PAGES];  // asked for meanwhile: by scores, and by sums
  const float *k_scales[PAGES], *v_scales[PAGES];

  template <class T>
  T* take(int64_t count) {
    T* p = (T*)memory;
    memory += (count * (int64_t)sizeof(T) + 63) & ~(int64_t)63;
    return p;
  }

  void start() {
    const int64_t group = item.head_end - item.head_start;
    rows = (item.token_end - item.token_start) * group;
    k_units = cache.k_stored / E::PER_UNIT;
    v_stored = cache.v_stored;
    step_bytes = cache.is_quantized ? LANES * E::PER_UNIT : LANES * 4;
    q = take<int32_t>(rows * k_units * E::WORDS);
    weights = take<int32_t>(rows * TILE / E::PER_UNIT * E::WORDS);
    k_tile = cache.is_quantized ? take<int32_t>(TILE * k_units) : nullptr;
    v_tile = cache.is_quantized || !cache.v ? take<int32_t>(TILE / E::PER_UNIT * v_stored) : nullptr;
    v_last = take<int32_t>(LANES / E::PER_UNIT * v_stored);
    scores = take<float>(16 * TILE);
    acc = take<float>(rows * v_stored);
    most = take<float>(rows);
    rescale = take<float>(rows);
    total = take<Floats>(rows);
    all_acc = take<float>(rows * v_stored);
    all_most = take<float>(rows);
    all_total = take<Floats>(rows);
    limit = take<int64_t>(rows);
    low = take<int64_t>(rows);
    const int64_t start = step.query_starts[item.sequence];
    first = first_of(item);
    if (query.sinks) memset(all_acc, 0, rows * v_stored * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = item.token_start + r / group, head = item.head_start + r % group;
      const Number* source = (const Number*)query.q + (start + token) * query.q_stride + head * cache.k_dim;
      Input* row = (Input*)(q + r * k_units * E::WORDS);
      FOR_LANES(d, n, cache.k_dim) store(row + d, get(source + d, n));
      const int64_t here = first + token + 1;
      limit[r] = step.until ? step.until[start + token] : here;
      low[r] = step.since ? std::min<int64_t>(low_of(here), step.since[start + token]) : low_of(here);
      all_most[r] = query.sinks ? query.sinks[head] : LOWEST;
      all_total[r] = Floats{};
      if (query.sinks) all_total[r][0] = 1.0f;
    }
    begin = low[0] / TILE * TILE;
    end = limit[rows - 1];
  }

  // The position of the first query of an item's sequence, and the first one that a query sees if it sees none from `limit` on.
  int64_t first_of(const Item& one) const {
    return step.lengths[one.sequence] - (step.query_starts[one.sequence + 1] - step.query_starts[one.sequence]);
  }
  int64_t low_of(int64_t limit) const { return query.window && limit > query.window ? limit - query.window : 0; }

  const int32_t* page(bool is_key, const Item& one, int64_t index) const {
    const int64_t block = step.tables[one.sequence * step.max_blocks + index / cache.pages_per_block];
    const int64_t inside = index % cache.pages_per_block;
    return (const int32_t*)(is_key ? cache.k : cache.v) + block * cache.block_stride +
           (one.kv_head * cache.pages_per_block + inside) * cache.page_units(is_key);
  }

  // Keys that are wanted once `at`, in the page of that index, is done with: of the next tile, or of what follows.
  const int32_t* keys_after(int64_t at, int64_t index) const {
    if (at + TILE < end) return page(true, item, at / LANES + PAGES);
    if (!following) return page(true, item, index);
    const int64_t start = first_of(*following), begin = low_of(start + following->token_start + 1) / TILE * TILE;
    const int64_t then = begin + at % TILE, last = start + following->token_end - 1;
    return page(true, *following, (then < last ? then : last) / LANES);
  }

  // Pages before the windows and after the end may belong to others: a needed one stands in, its scores masked.
  void find_pages(int64_t tile) {
    const int64_t oldest = tile > low[0] ? tile : low[0];
    for (int64_t p = 0; p < PAGES; p++) {
      const int64_t at = tile + p * LANES;
      const bool needed = at + LANES > oldest && at < end;
      const int64_t index = (needed ? at : oldest) / LANES;
      k_page[p] = page(true, item, index);
      next_page[p] = keys_after(at, index);
      if (cache.v) soon[p] = v_page[p] = page(false, item, index);
      if (cache.is_quantized) {
        if (cache.v) soon[p] = at + TILE < end ? page(false, item, at / LANES + PAGES) : v_page[p];
        widen_pages(p, needed ? p : (oldest - tile) / LANES, needed);
      }
    }
    if (cache.v) return;
    for (int p = 0; p < PAGES; p++) {
      int32_t* to = v_tile + p * (LANES / E::PER_UNIT) * v_stored;
      transpose_page<E>(to, k_page[p], v_stored);
      v_page[p] = to;
    }
  }

  // Pages p are units at `place` of the tile afterwards, as soon as another one that they stand for is.
  void widen_pages(int64_t p, int64_t place, bool needed) {
    constexpr int64_t UNITS = LANES / E::PER_UNIT;
    const int8_t *keys = (const int8_t*)k_page[p], *values = (const int8_t*)v_page[p];
    int32_t* k_to = k_tile + place * k_units * LANES;
    k_scales[p] = v_scales[p] = (const float*)(keys + LANES * cache.k_stored);
    ask((const int8_t*)next_page[p] + LANES * cache.k_stored, 64);
    if (needed) widen<E>(k_to, keys, k_units, LANES * E::PER_UNIT, LANES);
    if (needed && !cache.v) widen_second_part<E>(k_to, keys, k_scales[p], cache.k_first, cache.k_stored);
    k_page[p] = k_to;
    if (!cache.v) return;
    int32_t* v_to = v_tile + place * UNITS * v_stored;
    v_scales[p] = (const float*)(values + LANES * v_stored);
    ask((const int8_t*)soon[p] + LANES * v_stored, 64);
    for (int64_t u = 0; needed && u < UNITS; u++)
      widen<E>(v_to + u * v_stored, values + u * E::PER_UNIT * v_stored, v_stored / LANES, LANES, v_stored);
    v_page[p] = v_to;
  }

  // Pages of a tile that any row sees some of, at its beginning.
  int64_t pages_of(int64_t tile) const { return end - tile < TILE ? (end - tile + LANES - 1) / LANES : PAGES; }

  // Scores of rows r .. r + R - 1 over so many pages of the tile, or more. A third slower in a function of its own.
  template <bool AHEAD, int R>
  __attribute__((always_inline)) void score(int64_t r, int64_t pages) {
    const int32_t* a[R];
    constexpr int COLUMNS = columns_of(R, SUMS);
    for (int i = 0; i < R; i++) a[i] = q + (r + i) * k_units * E::WORDS;
    for (int p = 0; p < pages; p += COLUMNS) {
      Register part[R][COLUMNS * PARTS] = {};
      const int32_t* b[COLUMNS];
      for (int c = 0; c < COLUMNS; c++) b[c] = k_page[p + c];
      products<E>(part, a, b, k_units, LANES, [&](int64_t s) {
        for (int c = 0; AHEAD && c < COLUMNS; c++) ask((const char*)soon[p + c] + s * step_bytes, step_bytes);
      });
      for (int i = 0; i < R; i++)
        for (int c = 0; c < COLUMNS * PARTS; c++)
          store_register(scores + i * TILE + p * LANES + c * WIDTH, part[i][c]);
    }
  }

  // A row's weights from its scores s, and how much smaller the earlier ones have become. One copy for all callers, so
  // that a row's bits do not depend on how many rows come with it.
  __attribute__((noinline)) void weigh(int64_t tile, int64_t row, const float* s) {
    constexpr int COUNT = PAGES * PARTS;  // registers of a row
    const int32_t from = (int32_t)(low[row] - tile), to = (int32_t)(limit[row] - tile);
    RegisterInts seen[COUNT], token;
    for (int i = 0; i < WIDTH; i++) token[i] = i;
    Register x[COUNT], top[PARTS], sums[PARTS];
    for (int i = 0; i < PARTS; i++) top[i] = Register{} + LOWEST;
    for (int i = 0; i < COUNT; i++) {
      const int page = i / PARTS, part = i % PARTS;
      seen[i] = (token >= from) & (token < to);
      token += WIDTH;
      x[i] = load_register(s + i * WIDTH) * query.scale;
      if (cache.is_quantized) x[i] = x[i] * load_register(k_scales[page] + part * WIDTH);
      if (query.softcap != 0.0f) x[i] = tanh(x[i] / query.softcap) * query.softcap;
      x[i] = seen[i] ? x[i] : Register{} + LOWEST;
      top[part] = x[i] > top[part] ? x[i] : top[part];
    }
    Floats tops;
    memcpy(&tops, top, sizeof(tops));
    const float tallest = largest(tops), now = tallest > most[row] ? tallest : most[row];
    rescale[row] = now == most[row] ? 1.0f : exp(fill(most[row] - now))[0];
    most[row] = now;
    for (int i = 0; i < PARTS; i++) sums[i] = load_register((const float*)&total[row] + i * WIDTH) * rescale[row];
    for (int i = 0; i < COUNT; i++) {
      const int page = i / PARTS, part = i % PARTS;
      x[i] = seen[i] ? exp(x[i] - now) : Register{};
      sums[part] += x[i];
      if (cache.is_quantized)  // a scale that was never written may be NaN
        x[i] = seen[i] ? x[i] * load_register(v_scales[page] + part * WIDTH) : Register{};
    }
    Floats weighed[PAGES];
    memcpy(weighed, x, sizeof(x));
    for (int p = 0; p < PAGES; p++) store((Input*)weights + row * TILE + p * LANES, weighed[p]);
    memcpy(&total[row], sums, sizeof(sums));
  }

  // acc = acc * rescale + weights @ values, for rows r .. and dimensions d ..; `tokens` of the tile exist.
  template <bool AHEAD, int R, int C>
  void accumulate(int64_t tile, int64_t r, int64_t d, int64_t tokens) {
    constexpr int PAGE_UNITS = LANES / E::PER_UNIT;
    const int64_t next_bytes = k_units * step_bytes * LANES / v_stored / PAGE_UNITS;  // per step and column
    Register sums[R][C * PARTS];
    for (int i = 0; i < R; i++)
      for (int c = 0; c < C * PARTS; c++)
        sums[i][c] = load_register(acc + (r + i) * v_stored + d + c * WIDTH) * rescale[r + i];
    for (int64_t p = low[0] > tile ? (low[0] - tile) / LANES : 0; p * LANES < tokens; p++) {
      const int64_t here = tokens - p * LANES < LANES ? tokens - p * LANES : LANES, whole = here / E::PER_UNIT;
      const int32_t *a[R], *b[C];
      for (int i = 0; i < R; i++) a[i] = weights + ((r + i) * TILE / E::PER_UNIT + p * PAGE_UNITS) * E::WORDS;
      for (int c = 0; c < C; c++) b[c] = v_page[p] + d + c * LANES;
      const char* ahead = (const char*)next_page[p] + d / LANES * PAGE_UNITS * next_bytes;
      products<E>(sums, a, b, whole, v_stored, [&](int64_t s) {
        for (int c = 0; AHEAD && c < C; c++) ask(ahead + (c * PAGE_UNITS + s) * next_bytes, next_bytes);
      });
      if (whole * E::PER_UNIT < here) {  // the other half of the last pair was never written: it may be NaN
        Ints last[C];
        for (int i = 0; i < R; i++) a[i] += whole * E::WORDS;
        for (int c = 0; c < C; c++) {
          last[c] = E::first_only(load_units(b[c] + whole * v_stored));
          b[c] = (const int32_t*)&last[c];
        }
        products<E>(sums, a, b, 1, 0, [](int64_t) {});
      }
    }
    for (int i = 0; i < R; i++)
      for (int c = 0; c < C * PARTS; c++) store_register(acc + (r + i) * v_stored + d + c * WIDTH, sums[i][c]);
  }

  template <bool AHEAD, int R>
  void rows_of_tile(int64_t tile, int64_t r) {
    score<AHEAD, R>(r, pages_of(tile));
    for (int i = 0; i < R; i++) weigh(tile, r + i, scores + i * TILE);
    const int64_t tokens = end - tile < TILE ? end - tile : TILE;
    constexpr int COLUMNS = columns_of(R, SUMS);
    int64_t d = 0;
    for (; d + COLUMNS * LANES <= v_stored; d += COLUMNS * LANES) accumulate<AHEAD, R, COLUMNS>(tile, r, d, tokens);
    for (; d < v_stored; d += LANES) accumulate<AHEAD, R, 1>(tile, r, d, tokens);
  }

  template <int R>
  void rows_of_tile(int64_t tile, int64_t r) {
    if (r == 0 && cache.v) {
      rows_of_tile<true, R>(tile, r);
    } else {
      rows_of_tile<false, R>(tile, r);
    }
  }

#if QUIRE_ISA >= 4
  // Tiles 0 to 3 are sums; 4 and 5 are 32 dimensions of rows and of 16 keys; 6 and 7 are half as deep.
  void configure(int64_t count) {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
      config.column_bytes[i] = i == 6 ? 32 : 64;
      config.rows[i] = i == 5 ? 16 : i == 7 ? 8 : (uint8_t)count;
    }
    use_tiles(config);
  }

  // Scores of up to 16 rows from r on over so many pages of the tile, or more.
  template <bool AHEAD>
  void score_by_tiles(int64_t r, int64_t pages) {
    const int32_t* rows_of_q = q + r * k_units;
    finish_writes();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t u = 0;
    for (; u + 16 <= k_units; u += 16) {
      if (AHEAD)
        for (int p = 0; p < PAGES; p++) ask((const char*)soon[p] + u * step_bytes, 16 * step_bytes);
      _tile_loadd(4, rows_of_q + u, k_units * 4);
      _tile_loadd(5, k_page[0] + u * LANES, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (pages == 1) continue;
      _tile_loadd(5, k_page[1] + u * LANES, 64);
      _tile_dpbf16ps(1, 4, 5);
      if (pages == 2) continue;
      _tile_loadd(5, k_page[2] + u * LANES, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, k_page[3] + u * LANES, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
    if (u < k_units) {
      _tile_loadd(6, rows_of_q + u, k_units * 4);
      _tile_loadd(7, k_page[0] + u * LANES, 64);
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(7, k_page[1] + u * LANES, 64);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, k_page[2] + u * LANES, 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, k_page[3] + u * LANES, 64);
      _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, scores, TILE * 4);
    _tile_stored(1, scores + 16, TILE * 4);
    _tile_stored(2, scores + 32, TILE * 4);
    _tile_stored(3, scores + 48, TILE * 4);
  }

  // 16 dimensions from d on; A full block of 64 shares the loads of weights.
  template <bool AHEAD>
  void accumulate_by_tiles(int64_t tile, int64_t r, int64_t d, int64_t tokens) {
    const bool four = d + 64 <= v_stored;
    float* sums = acc + r * v_stored + d;
    const int64_t stride = v_stored * 4;
    finish_writes();
    _tile_loadd(0, sums, stride);
    if (four) {
      _tile_loadd(1, sums + 16, stride);
      _tile_loadd(2, sums + 32, stride);
      _tile_loadd(3, sums + 48, stride);
    }
    for (int64_t p = low[0] > tile ? (low[0] - tile) / LANES : 0; p * LANES < tokens; p++) {
      if (AHEAD) {
        const int64_t bytes = k_units * step_bytes / v_stored;  // per dimension
        ask((const char*)next_page[p] + bytes * d, bytes * (four ? 64 : 16));
      }
      _tile_loadd(6, weights + r * (TILE / 2) + p * (LANES / 2), TILE * 2);
      _tile_loadd(7, v_page[p] + d, stride);
      _tile_dpbf16ps(0, 6, 7);
      if (four) {
        _tile_loadd(7, v_page[p] + d + 16, stride);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, v_page[p] + d + 32, stride);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(7, v_page[p] + d + 48, stride);
        _tile_dpbf16ps(3, 6, 7);
      }
    }
    _tile_stored(0, sums, stride);
    if (four) {
      _tile_stored(1, sums + 16, stride);
      _tile_stored(2, sums + 32, stride);
      _tile_stored(3, sums + 48, stride);
    }
  }

  // A tile multiplies what was never written, too, and zero times NaN is NaN: the last page is copied with zeros.
  void clean_last_page(int64_t tokens) {
    const int64_t p = tokens / LANES, here = tokens % LANES;
    if (!here) return;
    for (int64_t t = 0; t < LANES / 2; t++) {
      const int32_t mask = 2 * t + 1 < here ? -1 : 2 * t < here ? 0xffff : 0;
      for (int64_t d = 0; d < v_stored; d++) v_last[t * v_stored + d] = v_page[p][t * v_stored + d] & mask;
    }
    v_page[p] = v_last;
  }

  template <bool AHEAD>
  void rows_by_tiles(int64_t tile, int64_t r, int64_t count) {
    const int64_t tokens = end - tile < TILE ? end - tile : TILE;
    score_by_tiles<AHEAD>(r, pages_of(tile));
    for (int64_t i = 0; i < count; i++) {
      weigh(tile, r + i, scores + i * TILE);
      if (rescale[r + i] == 1.0f) continue;
      float* sums = acc + (r + i) * v_stored;
      for (int64_t d = 0; d < v_stored; d += LANES) store(sums + d, load(sums + d) * rescale[r + i]);
    }
    for (int64_t d = 0; d < v_stored; d += d + 64 <= v_stored ? 64 : 16)
      accumulate_by_tiles<AHEAD>(tile, r, d, tokens);
  }

  void run_by_tiles(int64_t from, int64_t to) {
    int64_t configured = 0;
    for (int64_t tile = from; tile < to; tile += TILE) {
      find_pages(tile);
      if (end - tile < TILE) clean_last_page(end - tile);
      for (int64_t r = 0; r < rows; r += 16) {
        const int64_t count = rows - r < 16 ? rows - r : 16;
        if (limit[r + count - 1] <= tile || low[r] >= tile + TILE) continue;
        if (count != configured) configure(configured = count);
        if (r == 0 && cache.v) {
          rows_by_tiles<true>(tile, r, count);
        } else {
          rows_by_tiles<false>(tile, r, count);
        }
      }
    }
    _tile_release();
  }
#endif

  // What rows see of a span alone.
  void run_span(int64_t span) {
    const int64_t from = span * SPAN > begin ? span * SPAN : begin, to = (span + 1) * SPAN < end ? (span + 1) * SPAN : end;
    memset(acc, 0, rows * v_stored * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
      most[r] = LOWEST;
      total[r] = Floats{};
    }
#if QUIRE_ISA >= 4
    if (E::PER_UNIT == 2) return run_by_tiles(from, to);
#endif
    for (int64_t tile = from; tile < to; tile += TILE) {
      find_pages(tile);
      for (int64_t r = 0; r < rows; r += ROWS) {
        const int64_t count = rows - r < ROWS ? rows - r : ROWS;
        if (limit[r + count - 1] <= tile || low[r] >= tile + TILE) continue;
        if (count == 1) rows_of_tile<1>(tile, r);
        if (count == 2) rows_of_tile<2>(tile, r);
        if (ROWS > 2 && count == 3) rows_of_tile<ROWS < 3 ? 1 : 3>(tile, r);
        if (ROWS > 2 && count == 4) rows_of_tile<ROWS < 4 ? 1 : 4>(tile, r);
      }
    }
  }

  // Adds a span to those before. One copy for all callers, as of `weigh`.
  __attribute__((noinline)) void add_span(bool is_first) {
    if (is_first && !query.sinks) {  // to nothing
      std::swap(acc, all_acc);
      std::swap(most, all_most);
      return std::swap(total, all_total);
    }
    for (int64_t r = 0; r < rows; r++) {
      const float now = most[r] > all_most[r] ? most[r] : all_most[r];
      const float before = exp(fill(all_most[r] - now))[0], here = exp(fill(most[r] - now))[0];
      const auto add = [&](float* to, const float* from) {
        store_register(to, load_register(to) * before + load_register(from) * here);
      };
      for (int64_t d = 0; d < v_stored; d += WIDTH) add(all_acc + r * v_stored + d, acc + r * v_stored + d);
      for (int64_t i = 0; i < LANES; i += WIDTH) add((float*)(all_total + r) + i, (const float*)(total + r) + i);
      all_most[r] = now;
    }
  }

  // A span's results, to where they wait for others' or from there.
  template <bool KEEP>
  void move_span(char* kept) {
    const auto move = [&](auto* numbers, int64_t count) {
      KEEP ? memcpy(kept, numbers, count * sizeof(*numbers)) : memcpy(numbers, kept, count * sizeof(*numbers));
      kept += count * sizeof(*numbers);
    };
    move(total, rows);
    move(acc, rows * v_stored);
    move(most, rows);
  }

  void run(const Spans& spans) {
    start();
    const int64_t first_span = begin / SPAN, last = (end - 1) / SPAN;
    if (spans.only >= 0) {
      if (spans.only < first_span || spans.only > last) return;
      run_span(spans.only);
      return move_span<true>(spans.kept + spans.only * spans.bytes);
    }
    for (int64_t span = first_span; span <= last; span++) {
      spans.kept ? move_span<false>(spans.kept + span * spans.bytes) : run_span(span);
      add_span(span == first_span);
    }
    finish();
  }

  void finish() {
    const int64_t group = item.head_end - item.head_start;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = step.query_starts[item.sequence] + item.token_start + r / group;
      const int64_t head = item.head_start + r % group;
      Number* out = (Number*)query.out + (token * query.num_heads + head) * cache.v_dim;
      const Floats inverse = fill(1.0f / sum(all_total[r]));
      int64_t d = 0;
      for (; d + LANES <= cache.v_dim; d += LANES) store(out + d, load(all_acc + r * v_stored + d) * inverse);
      if (d < cache.v_dim) store_some(out + d, load(all_acc + r * v_stored + d) * inverse, cache.v_dim - d);
    }
  }
};

static inline void attend_item(const Cache& cache, const Step& step, const Query& query, const Item& item,
                               const Item* following, const Spans& spans, char* memory) {
  if (!cache.is_bf16) {
    Task<FloatUnits, float>{cache, step, query, item, following, memory}.run(spans);
  } else if (cache.is_quantized) {
    Task<WidenedUnits, Bf16>{cache, step, query, item, following, memory}.run(spans);
  } else {
    Task<Bf16Units, Bf16>{cache, step, query, item, following, memory}.run(spans);
  }
}
