// A head's matrix over a sequence's positions, for one instruction set. See recurrence.cpp.
//
// Columns of the matrix are independent of each other, so that lanes are columns and every sum is in the order of rows.

#include "vectors.inl"

constexpr int TOGETHER = 4;  // vectors of columns, whose sums do not wait for each other

static inline const float* floats(const float* x, float*, int64_t) { return x; }

static inline const float* floats(const Bf16* x, float* room, int64_t size) {
  FOR_LANES(i, n, size) { put(room + i, get(x + i, n), n); }
  return room;
}

// N vectors of columns from `at` on; where N is 1, it may be one of fewer columns.
template <int N, class T, class K>
static inline void recur_columns(const Recurrence& a, int64_t s, int64_t h, int64_t at, int64_t columns) {
  const int64_t n = N > 1 ? LANES : columns, key_head = h / (a.heads / a.key_heads) * a.dk, step = a.decays > 1;
  float* const matrix = a.state + a.rows[s] * a.state_stride + h * a.dk * a.dv + at;
  float q_room[MOST_KEYS], k_room[MOST_KEYS];
  for (int64_t t = a.starts[s]; t < a.starts[s + 1]; t++) {
    const float* q = floats((const K*)a.q + t * a.q_stride + key_head, q_room, a.dk);
    const float* k = floats((const K*)a.k + t * a.k_stride + key_head, k_room, a.dk);
    const float* decay = a.decay + (t * a.heads + h) * a.decays;
    const T* v = (const T*)a.v + t * a.v_stride + h * a.dv + at;
    Floats value[N], y[N] = {};
    for (int i = 0; i < N; i++) value[i] = get(v + i * LANES, n);
    if (a.beta) {
      Floats known[N] = {};
      for (int64_t d = 0; d < a.dk; d++) {
        const float key = decay[d * step] * k[d];
        for (int i = 0; i < N; i++) known[i] += get(matrix + d * a.dv + i * LANES, n) * key;
      }
      for (int i = 0; i < N; i++) value[i] = (value[i] - known[i]) * a.beta[t * a.heads + h];
    }
    for (int64_t d = 0; d < a.dk; d++) {
      for (int i = 0; i < N; i++) {
        float* here = matrix + d * a.dv + i * LANES;
        const Floats now = get(here, n) * decay[d * step] + value[i] * k[d];
        put(here, now, n);
        y[i] += now * q[d];
      }
    }
    T* out = (T*)a.out + (t * a.heads + h) * a.dv + at;
    for (int i = 0; i < N; i++) put(out + i * LANES, y[i], n);
  }
}

template <class T, class K>
static inline void recur_of(const Recurrence& a, int64_t s, int64_t h) {
  int64_t at = 0;
  for (; at + TOGETHER * LANES <= a.dv; at += TOGETHER * LANES) recur_columns<TOGETHER, T, K>(a, s, h, at, LANES);
  for (; at + LANES <= a.dv; at += LANES) recur_columns<1, T, K>(a, s, h, at, LANES);
  if (at < a.dv) recur_columns<1, T, K>(a, s, h, at, a.dv - at);
}

static inline void recur(const Recurrence& a, int64_t s, int64_t h) {
  if (a.is_bf16) {
    a.keys_are_bf16 ? recur_of<Bf16, Bf16>(a, s, h) : recur_of<Bf16, float>(a, s, h);
  } else {
    a.keys_are_bf16 ? recur_of<float, Bf16>(a, s, h) : recur_of<float, float>(a, s, h);
  }
}
