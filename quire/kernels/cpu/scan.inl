// Convolutions over time and Mamba's scan for one instruction set. See scan.cpp.

#include "vectors.inl"

static inline float number(float x) { return x; }
static inline float number(Bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, sizeof(y));
  return y;
}

// Channels i .. i + n - 1 of a row, `seen` being the rows that it sees, itself the last one.
template <class T, int K>
static inline void convolve_lanes(T* out, const float (*w)[CHANNELS], const T* const* seen, const T* bias, bool silu,
                                  int64_t i, int64_t n) {
  Floats y = get(w[0] + i, n) * get(seen[0] + i, n);
  for (int k = 1; k < K; k++) y = y + get(w[k] + i, n) * get(seen[k] + i, n);
  if (bias) y = y + get(bias + i, n);
  put(out + i, silu ? y * sigmoid(y) : y, n);
}

// The channels from `first` on of sequence s, row by row, because those of one row are side by side.
template <class T, int K>
static inline void convolve_by(const CausalConv& a, int64_t s, int64_t first) {
  const int64_t size = a.channels - first < CHANNELS ? a.channels - first : CHANNELS;
  const int64_t begin = a.starts[s], end = a.starts[s + 1];
  const T *x = (const T*)a.x + first, *weight = (const T*)a.weight + first * K, *bias = a.bias ? (const T*)a.bias + first : nullptr;
  T *out = (T*)a.out + first, *state = (T*)a.state + a.rows[s] * a.state_stride + first * (K - 1);
  float w[K][CHANNELS];
  T past[K - 1][CHANNELS];
  for (int64_t i = 0; i < size; i++) {
    for (int k = 0; k < K; k++) w[k][i] = number(weight[i * K + k]);
    for (int k = 0; k < K - 1; k++) past[k][i] = state[i * (K - 1) + k];
  }
  const auto row = [&](int64_t t) { return t < begin ? past[t - begin + K - 1] : x + t * a.stride; };
  for (int64_t t = begin; t < end; t++) {
    const T* seen[K];
    for (int k = 0; k < K; k++) seen[k] = row(t - K + 1 + k);
    T* to = out + t * a.channels;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) convolve_lanes<T, K>(to, w, seen, bias, a.silu, i, LANES);
    if (i < size) convolve_lanes<T, K>(to, w, seen, bias, a.silu, i, size - i);
  }
  for (int k = 0; k < K - 1; k++) {
    const T* kept = row(end - K + 1 + k);
    for (int64_t i = 0; i < size; i++) state[i * (K - 1) + k] = kept[i];
  }
}

template <class T>
static inline void convolve_of(const CausalConv& a, int64_t s, int64_t first) {
  switch (a.width) {  // scan.py calls for no others
    case 2: return convolve_by<T, 2>(a, s, first);
    case 3: return convolve_by<T, 3>(a, s, first);
    default: return convolve_by<T, 4>(a, s, first);
  }
}

static inline void convolve(const CausalConv& a, int64_t s, int64_t first) {
  if (a.starts[s] == a.starts[s + 1]) return;
  if (a.is_bf16) {
    convolve_of<Bf16>(a, s, first);
  } else {
    convolve_of<float>(a, s, first);
  }
}

// n channels of sequence s.
static inline void scan_lanes(const SelectiveScan& a, int64_t s, int64_t channel, int64_t n) {
  const float* rate = a.rate + channel;
  float* state = a.state + a.rows[s] * a.state_stride + channel;
  const Floats skip = get(a.skip + channel, n);
  for (int64_t t = a.starts[s]; t < a.starts[s + 1]; t++) {
    const Floats x = get(a.x + t * a.x_stride + channel, n), dt = get(a.dt + t * a.dt_stride + channel, n);
    const Floats input = dt * x;
    const float *b = a.b + t * a.b_stride, *c = a.c + t * a.c_stride;
    Floats y = fill(0);
    for (int64_t k = 0; k < a.size; k++) {
      float* at = state + k * a.channels;
      const Floats h = exp(dt * get(rate + k * a.channels, n)) * get(at, n) + input * b[k];
      put(at, h, n);
      y = y + h * c[k];
    }
    put(a.out + t * a.channels + channel, y + skip * x, n);
  }
}

static inline void scan(const SelectiveScan& a, int64_t s, int64_t first) {
  const int64_t end = first + CHANNELS < a.channels ? first + CHANNELS : a.channels;
  int64_t channel = first;
  for (; channel + LANES <= end; channel += LANES) scan_lanes(a, s, channel, LANES);
  if (channel < end) scan_lanes(a, s, channel, end - channel);
}
