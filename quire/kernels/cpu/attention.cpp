// Attention over the paged KV cache on a CPU, and writing into that cache. Plain C ABI.
//
// A page holds 16 tokens of one key head. A unit is 4 bytes: a float, or a pair of bf16.
//   keys    [k_stored / per_unit][16 tokens] units: a query's dot products with 16 tokens need no reduction
//   values  [16 / per_unit][v_stored] units: pairs of tokens side by side, for the same reason
// A block is, per layer, [num_kv_heads][block_size / 16] pages of keys, then as many of values. Stored dimensions
// are multiples of 16; what lies past k_dim is zero. Without values of their own (latent attention), the values
// are the first v_dim elements of the keys.
//
// Quantized pages hold int8, keys [k_stored][16 tokens] and values [16 tokens][v_stored], then 16 floats: a scale per
// token. They are widened to units before they are multiplied, since an int8 is exact in bf16; scores then meet the
// keys' scales, and probabilities the values'. A key that holds its value has two scales, one from the value's end on.
//
// Every row (a query position's head) goes through tiles of 64 positions, counted from position 0, in the same
// order and arithmetic whatever shares its batch and however its prompt was cut, so its result is the same bits.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cache.h"
#include "levels.h"
#include "quantized.h"
#include "scratch.h"

namespace {

constexpr int64_t TILE = 64;
constexpr int64_t SPAN = 512;  // positions, from a multiple of it on, that are added up alone
constexpr float LEAST_SCALE = 1e-30f;
constexpr int64_t MOST_ROWS = 32;  // of an item: its queries, scores and sums stay in the cache
constexpr int64_t LEAST_ROWS = 4;
constexpr size_t MOST_AT_ONCE = 4;  // items that a thread takes, if each takes several times

// Mirrored in quire/attention/cpu.py. How many sequences and tokens there are a call says: a step is the same for any number.
struct Step {
  const int32_t *query_starts, *lengths, *tables;
  const int64_t* slots;
  int64_t max_blocks, num_threads;
  const int32_t *until, *since;  // [num_tokens] or null; as in attention/base.py
};

struct Query {
  const void* q;
  int64_t num_heads, q_stride;  // elements from a position to the next
  void* out;         // [num_tokens][num_heads][v_dim]
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  const float* sinks;    // [num_heads] or null
};

// Some positions of a sequence's chunk and some heads of one key head's group.
struct Item {
  int64_t sequence, token_start, token_end, kv_head, head_start, head_end;
};

// Which spans of an item are computed, or where they are already: [spans], `bytes` from one to the next.
struct Spans {
  int64_t only = -1;  // this one, to be kept; else all, from what is kept if there is anything
  char* kept = nullptr;
  int64_t bytes = 0;
};

#define QUIRE_KERNELS "attention.inl"
#include "isa.h"

std::vector<Item> split(const Cache& cache, const Step& step, int64_t num_sequences, int64_t num_heads, int64_t most_rows) {
  std::vector<Item> items;
  const int64_t group = num_heads / cache.num_kv_heads;
  const int64_t heads = group < most_rows ? group : most_rows, tokens = most_rows / heads;
  for (int64_t s = 0; s < num_sequences; s++) {
    const int64_t count = step.query_starts[s + 1] - step.query_starts[s];
    for (int64_t t = 0; t < count; t += tokens)
      for (int64_t kv = 0; kv < cache.num_kv_heads; kv++)
        for (int64_t h = 0; h < group; h += heads)
          items.push_back({s, t, t + tokens < count ? t + tokens : count, kv, kv * group + h,
                           kv * group + (h + heads < group ? h + heads : group)});
  }
  return items;
}

// Of the longest sequence.
int64_t spans_of(const Step& step, int64_t num_sequences) {
  int64_t longest = 1;
  for (int64_t s = 0; s < num_sequences; s++) longest = std::max<int64_t>(longest, step.lengths[s]);
  return (longest + SPAN - 1) / SPAN;
}

// What a thread needs for an item.
char* own_memory(const Cache& cache) {
  static thread_local Scratch scratch;
  const int64_t row = (cache.k_stored + 2 * cache.v_stored + TILE + 96) * 4 + 64;
  const int64_t widened = cache.is_quantized ? TILE * cache.k_stored * 4 : 0;
  return scratch.of(MOST_ROWS * row + (TILE + 16) * cache.v_stored * 4 + widened + 16 * TILE * 4 + 4096);
}

}  // namespace

// Arguments as calls.py lays them out.
struct AttendCall {
  const Cache* cache;
  const Step* step;
  Query query;
  int64_t num_sequences, num_tokens;
};

// Threads share out spans, too, where there are fewer items than threads. A span is the same however it is computed.
static void attend_by_spans(const AttendCall& a, const std::vector<Item>& items, int64_t spans) {
  static thread_local Scratch scratch;
  const Cache& cache = *a.cache;
  const int64_t count = items.size(), span_bytes = MOST_ROWS * (cache.v_stored + 32) * 4;
  char* kept = scratch.of(count * spans * span_bytes);
#pragma omp parallel num_threads(a.step->num_threads)
  {
    char* memory = own_memory(cache);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count * spans; i++) {
      const Spans one{i % spans, kept + i / spans * spans * span_bytes, span_bytes};
      QUIRE_CALL(cache.isa, attend_item(cache, *a.step, a.query, items[i / spans], nullptr, one, memory));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      const Spans all{-1, kept + i * spans * span_bytes, span_bytes};
      QUIRE_CALL(cache.isa, attend_item(cache, *a.step, a.query, items[i], nullptr, all, memory));
    }
  }
}

extern "C" void quire_attend(const void* args) {
  const AttendCall& a = *(const AttendCall*)args;
  const Cache* cache = a.cache;
  const Step* step = a.step;
  const Query& query = a.query;
  const int64_t num_heads = query.num_heads;
  int64_t most_rows = MOST_ROWS;
  const int64_t spans = spans_of(*step, a.num_sequences);
  std::vector<Item> items = split(*cache, *step, a.num_sequences, num_heads, most_rows);
  while ((int64_t)items.size() * spans < step->num_threads && most_rows > LEAST_ROWS)
    items = split(*cache, *step, a.num_sequences, num_heads, most_rows /= 2);
  const int64_t row_bytes = num_heads * cache->v_dim * cache->item_bytes();
  const int64_t last = step->query_starts[a.num_sequences];
  memset((char*)query.out + last * row_bytes, 0, (a.num_tokens - last) * row_bytes);
  if ((int64_t)items.size() < step->num_threads && spans > 1) return attend_by_spans(a, items, spans);
  // Neighbours are taken together, whose pages are next to each other. A thread knows its next item, whose keys it can ask for.
  const size_t at_once = std::clamp<size_t>(items.size() / (2 * step->num_threads), 1, MOST_AT_ONCE);
  std::atomic<size_t> taken{0};
#pragma omp parallel num_threads(step->num_threads) if (items.size() > 1)
  {
    char* memory = own_memory(*cache);
    size_t next = 0;
    for (size_t i = taken++ * at_once; i < items.size(); i = next) {
      next = (i + 1) % at_once ? i + 1 : taken++ * at_once;
      const Item* following = next < items.size() ? &items[next] : nullptr;
      QUIRE_CALL(cache->isa, attend_item(*cache, *step, query, items[i], following, Spans{}, memory));
    }
  }
}

namespace {

// A token's x [dim] in a page of keys, or of values. The rest of its `stored` numbers are zeros.
template <int PER_UNIT, class T>
void put(bool is_key, T* page, int64_t token, const T* x, int64_t dim, int64_t stored) {
  if (is_key) {
    const int64_t whole = dim / PER_UNIT;
    T* to = page + token * PER_UNIT;
    for (int64_t u = 0; u < whole; u++) memcpy(to + u * PAGE * PER_UNIT, x + u * PER_UNIT, PER_UNIT * sizeof(T));
    for (int64_t d = whole * PER_UNIT; d < stored; d++)
      to[d / PER_UNIT * PAGE * PER_UNIT + d % PER_UNIT] = d < dim ? x[d] : T{};
  } else {
    T* to = page + token / PER_UNIT * stored * PER_UNIT + token % PER_UNIT;
    for (int64_t d = 0; d < dim; d++) to[d * PER_UNIT] = x[d];
    for (int64_t d = dim; d < stored; d++) to[d * PER_UNIT] = T{};
  }
}

void put_quantized(const Cache& cache, bool is_key, char* page, int64_t token, const void* x, int64_t dim,
                   int64_t stored) {
  static thread_local Scratch memory;
  const int64_t num_sums = stored / GROUP + 1;
  int32_t* sums = (int32_t*)memory.of(num_sums * sizeof(int32_t) + stored + PAGE);
  int8_t* row = (int8_t*)(sums + num_sums);
  float* scale = (float*)(page + PAGE * stored) + token;
  const auto quantize = [&](int64_t from, int64_t to, float* scale) {
    const char* numbers = (const char*)x + from * cache.item_bytes();
    const int64_t padded = (to - from + PAGE - 1) / PAGE * PAGE;
    const Rows one{(char*)row + from, scale, sums, numbers, to - from, padded, 0, cache.is_bf16 != 0, true};
    quantize_row(cache.isa, one, 0);
  };
  const bool has_parts = is_key && !cache.v;
  const int64_t second = has_parts ? cache.k_first : dim;
  quantize(0, second, scale);
  if (has_parts) {
    quantize(second, dim, scale + PAGE);
    if (*scale < LEAST_SCALE) *scale = LEAST_SCALE;  // the other is divided by it
  }
  put<1>(is_key, (int8_t*)page, token, row, dim, stored);
}

}  // namespace

void write_head(const Cache& cache, int64_t slot, bool is_key, int64_t head, const void* x) {
  const int64_t dim = is_key ? cache.k_dim : cache.v_dim, stored = is_key ? cache.k_stored : cache.v_stored;
  const int64_t size = cache.pages_per_block * PAGE, page = slot % size / PAGE, token = slot % PAGE;
  int32_t* block = (int32_t*)(is_key ? cache.k : cache.v) + slot / size * cache.block_stride;
  int32_t* to = block + (head * cache.pages_per_block + page) * cache.page_units(is_key);
  if (cache.is_quantized) {
    put_quantized(cache, is_key, (char*)to, token, x, dim, stored);
  } else if (cache.is_bf16) {
    put<2>(is_key, (uint16_t*)to, token, (const uint16_t*)x, dim, stored);
  } else {
    put<1>(is_key, (float*)to, token, (const float*)x, dim, stored);
  }
}

struct WriteCall {
  const Cache* cache;
  const Step* step;
  const void* k;
  int64_t k_stride;
  const void* v;  // null: none
  int64_t v_stride, num_tokens;
};

extern "C" void quire_write(const void* args) {
  const WriteCall& a = *(const WriteCall*)args;
  const Cache& cache = *a.cache;
  const Step& step = *a.step;
#pragma omp parallel for num_threads(step.num_threads) schedule(static) if (a.num_tokens >= 8)
  for (int64_t t = 0; t < a.num_tokens; t++) {
    if (step.slots[t] < 0) continue;
    const char *k = (const char*)a.k + t * a.k_stride * cache.item_bytes(),
               *v = (const char*)a.v + t * a.v_stride * cache.item_bytes();
    for (int64_t h = 0; h < cache.num_kv_heads; h++) {
      write_head(cache, step.slots[t], true, h, k + h * cache.k_dim * cache.item_bytes());
      if (a.v && cache.v) write_head(cache, step.slots[t], false, h, v + h * cache.v_dim * cache.item_bytes());
    }
  }
}
