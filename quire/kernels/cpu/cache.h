// Pages of keys and values (attention.cpp), for whoever writes into them.
#pragma once
#include <cstdint>

constexpr int64_t PAGE = 16;  // tokens

// Mirrored in quire/attention/cpu.py.
struct Cache {
  const void *k, *v;     // v null: values are inside the keys
  int64_t block_stride;  // units
  int64_t num_kv_heads, k_dim, v_dim, k_stored, v_stored;
  int64_t k_first;  // dimensions of a key that its first scale is for
  int64_t pages_per_block;
  int32_t is_bf16, is_quantized, isa;

  int64_t item_bytes() const { return is_bf16 ? 2 : 4; }  // of a number outside the cache

  // Units from a page of keys, or of values, to the next.
  int64_t page_units(bool is_key) const {
    const int64_t stored = is_key ? k_stored : v_stored, scales = is_key && !v ? 2 : 1;
    return is_quantized ? PAGE * (stored / 4 + scales) : PAGE * stored * item_bytes() / 4;
  }
};

// A token's key, or value, of a head: x [dim].
void write_head(const Cache& cache, int64_t slot, bool is_key, int64_t head, const void* x);
