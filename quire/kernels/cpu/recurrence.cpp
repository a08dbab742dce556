// Matrices that keys write values into and queries read, position by position, on a CPU: float32 inside, float32 or bf16
// outside. Plain C ABI.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MOST_KEYS = 512;  // dimensions of a key

// Arguments as calls.py lays them out.
struct Recurrence {
  int32_t isa, threads, is_bf16, keys_are_bf16;
  void* out;                        // [tokens][heads][dv]
  const void *v, *q, *k;            // a token's numbers `*_stride` from the one's before
  const float *decay, *beta;        // [tokens][heads][decays], [tokens][heads] or null
  float* state;                     // a row is [heads][dk][dv], `state_stride` numbers from the one before
  const int64_t* rows;              // [sequences]
  const int32_t* starts;            // [sequences + 1]
  int64_t sequences, tokens, heads, key_heads, dk, dv, decays;
  int64_t v_stride, q_stride, k_stride, state_stride;
};

#define QUIRE_OWN_WIDTH
#define QUIRE_KERNELS "recurrence.inl"
#include "isa.h"

}  // namespace

// A head of a sequence is one thread's, whatever else there is: its numbers are the same bits in every batch.
extern "C" void quire_recurrence(const void* args) {
  const Recurrence& a = *(const Recurrence*)args;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic) collapse(2) if (a.sequences * a.heads > 1)
  for (int64_t s = 0; s < a.sequences; s++) {
    for (int64_t h = 0; h < a.heads; h++) {
      QUIRE_CALL(a.isa, recur(a, s, h));
    }
  }
  const int64_t row = a.heads * a.dv * (a.is_bf16 ? 2 : 4), used = a.starts[a.sequences];
  memset((char*)a.out + used * row, 0, (a.tokens - used) * row);  // padding, which others may reckon with
}
