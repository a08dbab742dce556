// Lanes of float, as the compiler's vectors. Included inside the namespace of an instruction set (isa.h), because inlining
// comes too late to widen them.
//
// Usually there are sixteen: one AVX-512 register, two AVX ones, four SSE ones. A file of kernels whose memory is laid out
// for no number of them defines QUIRE_OWN_WIDTH and has as many as a register of the machine. That is faster, since the
// compiler takes some operations of longer vectors apart, lane by lane.

#if QUIRE_ISA >= 2
constexpr int WIDTH = 16;  // of a register
#elif QUIRE_ISA == 1
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
#ifdef QUIRE_OWN_WIDTH
constexpr int LANES = WIDTH;
#else
constexpr int LANES = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef float FloatsAt __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntsAt __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline Floats fill(float x) { return Floats{} + x; }
static inline Floats load(const float* p) { return *(const FloatsAt*)p; }
static inline void store(float* p, Floats x) { *(FloatsAt*)p = x; }
static inline Ints load_units(const int32_t* p) { return *(const IntsAt*)p; }

struct Bf16 {
  uint16_t bits;
};

// What the compiler takes apart if it is of two registers, and some of it otherwise. The larger of two is the second one where
// either is no number.
#if QUIRE_ISA == 1 && !defined(QUIRE_OWN_WIDTH)
struct FloatPair {
  __m256 low, high;
};
struct IntPair {
  __m256i low, high;
};
template <class To, class From>
static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
static inline Floats larger(Floats a, Floats b) {
  const auto x = as<FloatPair>(a), y = as<FloatPair>(b);
  return as<Floats>(FloatPair{_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)});
}
static inline Words as_words(Halves x) {
  const __m256i y = (__m256i)x;
  return as<Words>(IntPair{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(y)),
                           _mm256_cvtepu16_epi32(_mm256_extracti128_si256(y, 1))});
}
static inline Halves as_halves(Words x) {
  const auto y = as<IntPair>(x);
  return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32(y.low, y.high), 0xd8);
}
static inline Floats as_floats(Ints x) {
  const auto y = as<IntPair>(x);
  return as<Floats>(FloatPair{_mm256_cvtepi32_ps(y.low), _mm256_cvtepi32_ps(y.high)});
}
#elif QUIRE_ISA >= 2
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Words as_words(Halves x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
static inline Halves as_halves(Words x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }
static inline Floats as_floats(Ints x) { return (Floats)_mm512_cvtepi32_ps((__m512i)x); }
#else
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Words as_words(Halves x) { return __builtin_convertvector(x, Words); }
static inline Halves as_halves(Words x) { return __builtin_convertvector(x, Halves); }
static inline Floats as_floats(Ints x) { return __builtin_convertvector(x, Floats); }
#endif

template <class V>
static inline V magnitude(V x) {
  return (V)((decltype(x < x))x & 0x7fffffff);
}

static inline Floats load(const Bf16* p) { return (Floats)(as_words(*(const HalvesAt*)p) << 16); }

// Rounds to nearest even; NaN stays NaN. AVX512-BF16 makes 0 of numbers below 2^-126.
static inline Halves to_bf16(Floats x) {
#if QUIRE_ISA >= 3
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words w = (Words)x, rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16, quiet = (w >> 16) | 0x40;
  const Words nan = (Words)((0x7f800000 - (Ints)(w & 0x7fffffff)) >> 31);  // not by a comparison: see above
  return as_halves((rounded & ~nan) | (quiet & nan));
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

// A half of a vector of N numbers, from number F on. Not by memcpy, for which GCC keeps the vector in memory wherever it is.
template <int F, int N, class V>
static inline auto half(V x) {
  if constexpr (N == 16) {
    return __builtin_shufflevector(x, x, F, F + 1, F + 2, F + 3, F + 4, F + 5, F + 6, F + 7);
  } else if constexpr (N == 8) {
    return __builtin_shufflevector(x, x, F, F + 1, F + 2, F + 3);
  } else {
    return __builtin_shufflevector(x, x, F, F + 1);
  }
}
// A vector's numbers made one by a function of two vectors: of its halves, of the halves of that, and so on.
template <class V, class Join>
static inline auto joined(V x, Join join) {
  constexpr int N = sizeof(V) / sizeof(x[0]);
  if constexpr (N == 2) {
    return join(x[0], x[1]);
  } else {
    return joined(join(half<0, N>(x), half<N / 2, N>(x)), join);
  }
}
template <class V>
static inline auto sum(V x) {
  return joined(x, [](auto a, auto b) { return a + b; });
}
template <class V>
static inline float largest(V x) {
  return joined(x, [](auto a, auto b) { return a > b ? a : b; });
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
