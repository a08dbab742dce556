// Sixteen lanes of float, as the compiler's vectors: one AVX-512 register, two AVX ones, four SSE ones.
// Included inside the namespace of an instruction set (isa.h), because inlining comes too late to widen them.

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef float FloatsAt __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IntsAt __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int LANES = 16;

static inline Floats fill(float x) { return Floats{} + x; }
static inline Floats load(const float* p) { return *(const FloatsAt*)p; }
static inline void store(float* p, Floats x) { *(FloatsAt*)p = x; }
static inline Ints load_units(const int32_t* p) { return *(const IntsAt*)p; }

struct Bf16 {
  uint16_t bits;
};

static inline Floats load(const Bf16* p) {
  return (Floats)(__builtin_convertvector(*(const HalvesAt*)p, Words) << 16);
}

// The lower halves of words below 2^16.
static inline Halves narrowed(Words w) {
#if QUIRE_ISA == 1
  __m256i parts[2];
  memcpy(parts, &w, sizeof(w));
  return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32(parts[0], parts[1]), 0xd8);
#else
  return __builtin_convertvector(w, Halves);
#endif
}

// Rounds to nearest even; NaN stays NaN.
static inline Halves to_bf16(Floats x) {
#if QUIRE_ISA >= 3
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Words w = (Words)x;
  Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  Words quiet = (w >> 16) | 0x40;
  Words nan = (Words)((0x7f800000 - (Ints)(w & 0x7fffffff)) >> 31);  // compilers take comparisons of long vectors apart
  return narrowed((rounded & ~nan) | (quiet & nan));
#endif
}

static inline void store(Bf16* p, Floats x) { *(HalvesAt*)p = to_bf16(x); }

// The first n < 16 elements; the other lanes are zero.
template <class T>
static inline Floats load_some(const T* p, int64_t n) {
  T padded[LANES] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
static inline void store_some(T* p, Floats x, int64_t n) {
  T padded[LANES];
  store(padded, x);
  memcpy(p, padded, n * sizeof(T));
}

// A loop over each 16 (or, at the end, n < 16) elements of a row: those from i on.
#define FOR_LANES(i, n, size) \
  for (int64_t i = 0, n = LANES; (n = (size) - i < LANES ? (size) - i : LANES), i < (size); i += LANES)

template <class T>
static inline Floats get(const T* p, int64_t n) {
  return n == LANES ? load(p) : load_some(p, n);
}

template <class T>
static inline void put(T* p, Floats x, int64_t n) {
  if (n == LANES) {
    store(p, x);
  } else {
    store_some(p, x, n);
  }
}

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline float sum(Floats x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight lo = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
  Eight hi = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  Eight e = lo + hi;
  Four f = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

static inline float largest(Floats x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight lo = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
  Eight hi = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  Eight e = lo > hi ? lo : hi;
  Four a = __builtin_shufflevector(e, e, 0, 1, 2, 3), b = __builtin_shufflevector(e, e, 4, 5, 6, 7);
  Four f = a > b ? a : b;
  float x0 = f[0] > f[2] ? f[0] : f[2], x1 = f[1] > f[3] ? f[1] : f[3];
  return x0 > x1 ? x0 : x1;
}

// e^x to about one unit in the last place (Cephes' polynomial); exp(0) is 1; NaN stays NaN; no denormals.
template <class V>
static inline V exp(V x) {
  typedef decltype(x < x) Whole;
  x = x < -87.3f ? V{} - 87.3f : x;
  x = x > 88.3f ? V{} + 88.3f : x;
  const float magic = 12582912.0f;  // adding it rounds to an integer, in the low bits
  V t = x * 1.44269504f + magic;
  Whole n = (Whole)t - 0x4b400000;
  V whole = t - magic;
  V f = x - whole * 0.693359375f;
  f = f + whole * 2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  return p * (V)((n + 127) << 23);
}

template <class V>
static inline V tanh(V x) {
  return 1.0f - 2.0f / (exp(x + x) + 1.0f);
}

static inline Floats sigmoid(Floats x) { return 1.0f / (exp(-x) + 1.0f); }
