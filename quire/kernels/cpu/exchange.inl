// Sums of what ranks share, for one instruction set. See exchange.cpp.

#include "vectors.inl"

struct Fp16 {
  uint16_t bits;
};

static inline Floats load(const Fp16* p) {
  const Words h = as_words(*(const HalvesAt*)p), magnitude = (h & 0x7fff) << 13;
  const Words special = (Words)((Ints)(0x0f7fffff - (Ints)magnitude) >> 31) & 0x7f800000;  // infinite or no number
  const Words x = (Words)((Floats)magnitude * 0x1p112f) | special;  // a power of two: exact, also for subnormals
  return (Floats)(x | (h & 0x8000) << 16);
}

// Rounds to nearest even, large ones to infinity; NaN stays NaN.
static inline void store(Fp16* p, Floats x) {
  const Words w = (Words)x, sign = w >> 16 & 0x8000, m = w & 0x7fffffff;
  const Words normal = (m + 0xc8000fff + (m >> 13 & 1)) >> 13;
  const Words subnormal = (Words)((Floats)m + 0.5f) - 0x3f000000;  // rounded by the addition
  const Words is_small = (Words)(((Ints)m - 0x38800000) >> 31), is_large = (Words)((0x477fffff - (Ints)m) >> 31);
  const Words is_nan = (Words)((0x7f800000 - (Ints)m) >> 31);
  Words y = (subnormal & is_small) | (normal & ~is_small & ~is_large) | (0x7c00 & is_large);
  y |= 0x0200 & is_nan;
  *(HalvesAt*)p = as_halves(y | sign);
}

template <int N, class T>
static inline void add_vectors(T* out, const T* slots, int64_t stride, int64_t size) {
  Floats total[N];
  for (int j = 0; j < N; j++) total[j] = load(slots + j * LANES);
  for (int64_t r = 1; r < size; r++) {
    for (int j = 0; j < N; j++) total[j] = total[j] + load(slots + r * stride + j * LANES);
  }
  for (int j = 0; j < N; j++) store(out + j * LANES, total[j]);
}

template <class T>
static inline void add_floats(T* out, const T* slots, int64_t stride, int64_t size, int64_t count) {
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) add_vectors<4>(out + i, slots + i, stride, size);
  for (; i + LANES <= count; i += LANES) add_vectors<1>(out + i, slots + i, stride, size);
  if (i == count) return;
  Floats total = load_some(slots + i, count - i);
  for (int64_t r = 1; r < size; r++) total = total + load_some(slots + r * stride + i, count - i);
  store_some(out + i, total, count - i);
}

template <class T>
static inline void add_integers(T* out, const T* slots, int64_t stride, int64_t size, int64_t count) {
  memcpy(out, slots, count * sizeof(T));
  for (int64_t r = 1; r < size; r++) {
    for (int64_t i = 0; i < count; i++) out[i] += slots[r * stride + i];
  }
}

template <class T, class Add>
static inline void add_of(Add add, const AllReduce& a, const char* slots, int64_t start, int64_t i, int64_t end) {
  add((T*)a.out + (i - a.begin), (const T*)slots + (i - start), a.slot_bytes / sizeof(T), a.size, end - i);
}

// The sums i..end, in the order of ranks, of slots that hold everybody's elements from `start` on.
static inline void add_slots(const AllReduce& a, const Region& region, uint64_t round, int64_t start, int64_t i,
                             int64_t end) {
  const char* slots = region.slot(round, 0);
  switch (a.type) {
    case BF16: add_of<Bf16>(add_floats<Bf16>, a, slots, start, i, end); break;
    case FP16: add_of<Fp16>(add_floats<Fp16>, a, slots, start, i, end); break;
    case FP32: add_of<float>(add_floats<float>, a, slots, start, i, end); break;
    case INT32: add_of<uint32_t>(add_integers<uint32_t>, a, slots, start, i, end); break;
    default: add_of<uint64_t>(add_integers<uint64_t>, a, slots, start, i, end);
  }
}
