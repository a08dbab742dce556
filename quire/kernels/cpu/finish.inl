// Results of products, for one instruction set. See finish.cpp.

#include "vectors.inl"
#include "activations.inl"
#include "heads.inl"

constexpr int64_t ROWS_AHEAD = 8;

static inline Floats get(const void* p, bool is_bf16, int64_t at, int64_t n) {
  return is_bf16 ? get((const Bf16*)p + at, n) : get((const float*)p + at, n);
}
static inline void put(void* p, bool is_bf16, int64_t at, Floats x, int64_t n) {
  if (is_bf16) {
    put((Bf16*)p + at, x, n);
  } else {
    put((float*)p + at, x, n);
  }
}

// Results `at` .. of a row, of which n exist, from their sums.
static inline Floats result(const Finish& a, const float* sums, int64_t row, int64_t at, int64_t n) {
  Floats x = load(sums);
  if (a.kind == BYTES) {
    const Ints whole = load_units((const int32_t*)sums) - 128 * a.x_sums[row];
    x = as_floats(whole) * (a.x_scales[row] * load(a.weight_scales + at));
  } else if (a.x_scales) {
    x = x * a.x_scales[row];
  }
  return a.bias ? x + get(a.bias, a.bias_bf16, at, n) : x;
}

// Rows are far apart, so what is read and written soon is asked for: `count` results from `start` on.
static inline void ask_for_row(const Finish& a, int64_t row, int64_t start, int64_t count) {
  const Fused& to = a.fused;
  const int64_t size = to.residual_bf16 ? 2 : 4, out_size = a.out_bf16 ? 2 : 4;
  const char* out = (const char*)a.out + (row * a.out_stride + start) * out_size;
  for (int64_t i = 0; i < count * out_size; i += 64) __builtin_prefetch(out + i, 1);
  if (!to.residual) return;
  const char* residual = (const char*)to.residual + (row * to.residual_stride + start) * size;
  const char* total = (const char*)to.total + (row * a.outputs + start) * size;
  for (int64_t i = 0; i < count * size; i += 64) {
    __builtin_prefetch(residual + i);
    __builtin_prefetch(total + i, 1);
  }
}

template <bool WHOLE>
static inline void plain_row(const Finish& a, const float* sums, int64_t row, int64_t start, int64_t count) {
  const int64_t end = WHOLE ? BLOCK : count;
  for (int64_t i = 0; i < end; i += LANES) {
    const int64_t n = WHOLE || end - i > LANES ? LANES : end - i;
    put(a.out, a.out_bf16, row * a.out_stride + start + i, result(a, sums + i, row, start + i, n), n);
  }
}

template <bool WHOLE>
static inline void add_row(const Finish& a, const float* sums, int64_t row, int64_t start, int64_t count) {
  const Fused& to = a.fused;
  const int64_t end = WHOLE ? BLOCK : count;
  Floats squares{};
  for (int64_t i = 0; i < end; i += LANES) {
    const int64_t at = start + i, n = WHOLE || end - i > LANES ? LANES : end - i;
    Floats total = result(a, sums + i, row, at, n) + get(to.residual, to.residual_bf16, row * to.residual_stride + at, n);
    put(to.total, to.residual_bf16, row * a.outputs + at, total, n);
    for (int64_t lane = n; lane < LANES; lane++) total[lane] = 0;
    squares = squares + total * total;
    if (to.gain) total = total * (get(to.gain, a.out_bf16, at, n) + to.offset);
    put(a.out, a.out_bf16, row * a.out_stride + at, total, n);
  }
  to.new_squares[row * ((a.outputs + BLOCK - 1) / BLOCK) + start / BLOCK] = sum(squares);
}

static inline void gate_row(const Finish& a, const float* gates, const float* ups, int64_t row, int64_t start) {
  for (int64_t i = 0; i < BLOCK; i += LANES) {
    const Floats gate = result(a, gates + i, row, start + i, LANES);
    const Floats up = result(a, ups + i, row, a.outputs / 2 + start + i, LANES);
    put(a.out, a.out_bf16, row * a.out_stride + start + i, gated(gate, up, a.fused.activation), LANES);
  }
}

template <class P>
static inline void head_row(const Finish& a, const float* sums, int64_t row, int64_t head) {
  const Heads& to = *a.fused.heads;
  const int64_t size = to.size, at = to.positions[row] * to.half, kv_head = head - to.num_queries;
  const int64_t num_keys = to.cache->num_kv_heads;
  float x[MOST_PARTS * BLOCK];
  for (int64_t i = 0; i < size; i += LANES)
    store(x + i, result(a, sums + i / BLOCK * CHUNK_ROWS * BLOCK + i % BLOCK, row, head * size + i, LANES));
  if (kv_head < num_keys) {
    const float* weight = to.weights ? to.weights + head * size : nullptr;
    norm_rope_head<P>(x, weight, size, to.eps, to.cos + at, to.sin + at, to.half);
  }
  char kept[sizeof(x)], *query = (char*)a.out + (row * a.out_stride + head * size) * (a.out_bf16 ? 2 : 4);
  char* out = kv_head < 0 ? query : kept;
  for (int64_t i = 0; i < size; i += LANES) put(out, a.out_bf16, i, load(x + i), LANES);
  if (kv_head >= 0 && to.slots[row] >= 0)
    write_head(*to.cache, to.slots[row], kv_head < num_keys, kv_head % num_keys, out);
}

template <bool WHOLE>
static void finish_block(Finish a, const float* sums, int64_t top, int64_t rows, int64_t item) {
  const int64_t start = item * BLOCK, count = a.outputs - start < BLOCK ? a.outputs - start : BLOCK;
  const Heads* heads = a.fused.heads;
  const int64_t width = !heads ? count : item < heads->num_queries ? heads->size : 0;  // of out
  for (int64_t row = top; row < top + rows; row++, sums += BLOCK) {
    if (row + ROWS_AHEAD < top + rows) ask_for_row(a, row + ROWS_AHEAD, heads ? item * width : start, width);
    if (a.fused.residual) {
      add_row<WHOLE>(a, sums, row, start, count);
    } else if (heads) {
      heads->interleaved ? head_row<Neighbours>(a, sums, row, item) : head_row<Apart>(a, sums, row, item);
    } else if (a.fused.gated) {
      gate_row(a, sums, sums + CHUNK_ROWS * BLOCK, row, start);
    } else {
      plain_row<WHOLE>(a, sums, row, start, count);
    }
  }
}

static void finish_rows(const Finish& a, const float* sums, int64_t top, int64_t rows, int64_t item) {
  if ((item + 1) * BLOCK <= a.outputs) {
    finish_block<true>(a, sums, top, rows, item);
  } else {
    finish_block<false>(a, sums, top, rows, item);
  }
}

static inline void finish_norm(const FinishNorm& a, int64_t row) {
  const float inverse = row_scale(a.norm, row, a.size);
  FOR_LANES(i, n, a.size) {
    put(a.out, a.is_bf16, row * a.size + i, get(a.x, a.is_bf16, row * a.size + i, n) * inverse, n);
  }
}
