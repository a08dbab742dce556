// Convolutions over time and Mamba's scan: each sequence's positions in their order, channels side by side. Plain C ABI.
//
// A channel is computed the same way whatever sequences there are and wherever steps end. So results are the same bits.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elementwise.h"

namespace {

constexpr int64_t CHANNELS = 64;  // of a thread's share

// Arguments as calls.py lays them out. Sequence s has rows starts[s] .. starts[s + 1] of x, and row rows[s] of the state.
struct CausalConv {
  int32_t isa, threads, is_bf16, silu;
  void* out;                      // [num_rows][channels]
  const void *x, *weight, *bias;  // weight: [channels][width]; bias may be null
  void* state;                    // [channels][width - 1] of a row
  const int64_t* rows;
  const int32_t* starts;
  int64_t num_seqs, num_rows, channels, width, stride, state_stride;
};

struct SelectiveScan {
  int32_t isa, threads;
  float* out;
  const float *x, *dt, *rate, *b, *c, *skip;  // rate: [size][channels]
  float* state;                               // [size][channels] of a row
  const int64_t* rows;
  const int32_t* starts;
  int64_t num_seqs, num_rows, channels, size, x_stride, dt_stride, b_stride, c_stride, state_stride;
};

#define QUIRE_OWN_WIDTH
#define QUIRE_KERNELS "scan.inl"
#include "isa.h"

int64_t shares(int64_t channels) { return (channels + CHANNELS - 1) / CHANNELS; }

// Rows after the last sequence's are padding.
template <class A>
void clear_padding(const A& a, int64_t itemsize) {
  const int64_t used = a.starts[a.num_seqs], row_bytes = a.channels * itemsize;
  memset((char*)a.out + used * row_bytes, 0, (a.num_rows - used) * row_bytes);
}

}  // namespace

// Channels in the outer loop: then all threads have a share of a long sequence among short ones.

extern "C" void quire_causal_conv(const void* args) {
  const CausalConv& a = *(const CausalConv*)args;
  const int64_t work = a.num_rows * a.channels;
#pragma omp parallel for collapse(2) num_threads(a.threads) schedule(static) if (work >= PARALLEL_ELEMENTS)
  for (int64_t share = 0; share < shares(a.channels); share++) {
    for (int64_t s = 0; s < a.num_seqs; s++) {
      QUIRE_CALL(a.isa, convolve(a, s, share * CHANNELS));
    }
  }
  clear_padding(a, a.is_bf16 ? 2 : 4);
}

extern "C" void quire_selective_scan(const void* args) {
  const SelectiveScan& a = *(const SelectiveScan*)args;
  const int64_t work = a.num_rows * a.channels * a.size;
#pragma omp parallel for collapse(2) num_threads(a.threads) schedule(static) if (work >= PARALLEL_ELEMENTS)
  for (int64_t share = 0; share < shares(a.channels); share++) {
    for (int64_t s = 0; s < a.num_seqs; s++) {
      QUIRE_CALL(a.isa, scan(a, s, share * CHANNELS));
    }
  }
  clear_padding(a, sizeof(float));
}
