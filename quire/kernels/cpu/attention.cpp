// Attention over the paged KV cache on a CPU, and writing into that cache. Plain C ABI.
//
// A page holds 16 tokens of one key head. A unit is 4 bytes: a float, or a pair of bf16.
//   keys    [k_stored / per_unit][16 tokens] units: a query's dot products with 16 tokens need no reduction
//   values  [16 / per_unit][v_stored] units: pairs of tokens side by side, for the same reason
// A block is, per layer, [num_kv_heads][block_size / 16] pages of keys, then as many of values. Stored dimensions
// are multiples of 16; what lies past k_dim is zero. Without values of their own (latent attention), the values
// are the first v_dim elements of the keys.
//
// Every row (a query position's head) goes through tiles of 64 positions, counted from position 0, in the same
// order and arithmetic whatever shares its batch and however its prompt was cut, so its result is the same bits.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TILE = 64;
constexpr int64_t MOST_ROWS = 32;  // of an item: its queries, scores and sums stay in the cache
constexpr int64_t LEAST_ROWS = 4;

// Mirrored in quire/attention/cpu.py.
struct Cache {
  const void *k, *v;     // v null: values are inside the keys
  int64_t block_stride;  // units
  int64_t num_kv_heads, k_dim, v_dim, k_stored, v_stored, pages_per_block;
  int32_t is_bf16, isa;
};

struct Step {
  const int32_t *query_starts, *lengths, *tables;
  const int64_t* slots;
  int64_t num_sequences, max_blocks, num_tokens, num_threads;
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

#define QUIRE_KERNELS "attention.inl"
#include "isa.h"

std::vector<Item> split(const Cache& cache, const Step& step, int64_t num_heads, int64_t most_rows) {
  std::vector<Item> items;
  const int64_t group = num_heads / cache.num_kv_heads;
  const int64_t heads = group < most_rows ? group : most_rows, tokens = most_rows / heads;
  for (int64_t s = 0; s < step.num_sequences; s++) {
    const int64_t count = step.query_starts[s + 1] - step.query_starts[s];
    for (int64_t t = 0; t < count; t += tokens)
      for (int64_t kv = 0; kv < cache.num_kv_heads; kv++)
        for (int64_t h = 0; h < group; h += heads)
          items.push_back({s, t, t + tokens < count ? t + tokens : count, kv, kv * group + h,
                           kv * group + (h + heads < group ? h + heads : group)});
  }
  return items;
}

int64_t memory_bytes(const Cache& cache) {
  const int64_t row = (cache.k_stored + cache.v_stored + TILE + 64) * 4 + 64;
  return MOST_ROWS * row + (TILE + 16) * cache.v_stored * 4 + 16 * TILE * 4 + 4096;
}

}  // namespace

// Arguments as calls.py lays them out.
struct AttendCall {
  const Cache* cache;
  const Step* step;
  Query query;
};

extern "C" void quire_attend(const void* args) {
  const AttendCall& a = *(const AttendCall*)args;
  const Cache* cache = a.cache;
  const Step* step = a.step;
  const Query& query = a.query;
  const int64_t num_heads = query.num_heads;
  int64_t most_rows = MOST_ROWS;
  std::vector<Item> items = split(*cache, *step, num_heads, most_rows);
  while ((int64_t)items.size() < step->num_threads && most_rows > LEAST_ROWS)
    items = split(*cache, *step, num_heads, most_rows /= 2);
  const int64_t row_bytes = num_heads * cache->v_dim * (cache->is_bf16 ? 2 : 4);
  const int64_t last = step->query_starts[step->num_sequences];
  memset((char*)query.out + last * row_bytes, 0, (step->num_tokens - last) * row_bytes);
#pragma omp parallel num_threads(step->num_threads) if (items.size() > 1)
  {
    char* memory = (char*)aligned_alloc(64, (memory_bytes(*cache) + 63) / 64 * 64);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) {
      QUIRE_CALL(cache->isa, attend_item(*cache, *step, query, items[i], memory));
    }
    free(memory);
  }
}

namespace {

template <class T>
void write_token(const Cache& cache, int64_t slot, const T* k, const T* v) {
  constexpr int64_t PER_UNIT = 4 / sizeof(T), LANES = 16;
  const int64_t size = cache.pages_per_block * LANES, block = slot / size, offset = slot % size;
  const int64_t page = offset / LANES, token = offset % LANES;
  for (int64_t h = 0; h < cache.num_kv_heads; h++) {
    const int64_t index = h * cache.pages_per_block + page;
    T* to = (T*)((int32_t*)cache.k + block * cache.block_stride) + index * LANES * cache.k_stored;
    for (int64_t d = 0; d < cache.k_stored; d++)
      to[(d / PER_UNIT * LANES + token) * PER_UNIT + d % PER_UNIT] = d < cache.k_dim ? k[h * cache.k_dim + d] : T{};
    if (!v) continue;
    to = (T*)((int32_t*)cache.v + block * cache.block_stride) + index * LANES * cache.v_stored;
    for (int64_t d = 0; d < cache.v_stored; d++)
      to[(token / PER_UNIT * cache.v_stored + d) * PER_UNIT + token % PER_UNIT] =
          d < cache.v_dim ? v[h * cache.v_dim + d] : T{};
  }
}

}  // namespace

struct WriteCall {
  const Cache* cache;
  const Step* step;
  const void* k;
  int64_t k_stride;
  const void* v;  // null: none
  int64_t v_stride;
};

extern "C" void quire_write(const void* args) {
  const WriteCall& a = *(const WriteCall*)args;
  const Cache* cache = a.cache;
  const Step* step = a.step;
  const bool has_v = a.v && cache->v;
#pragma omp parallel for num_threads(step->num_threads) schedule(static) if (step->num_tokens >= 8)
  for (int64_t t = 0; t < step->num_tokens; t++) {
    const int64_t slot = step->slots[t];
    if (slot < 0) continue;
    if (cache->is_bf16) {
      const uint16_t *keys = (const uint16_t*)a.k + t * a.k_stride, *values = (const uint16_t*)a.v + t * a.v_stride;
      write_token(*cache, slot, keys, has_v ? values : nullptr);
    } else {
      const float *keys = (const float*)a.k + t * a.k_stride, *values = (const float*)a.v + t * a.v_stride;
      write_token(*cache, slot, keys, has_v ? values : nullptr);
    }
  }
}
