// Blocks of dot products over units, for one instruction set.

#include "vectors.inl"

typedef float EightFloats __attribute__((vector_size(32)));

// sum + b * f, rounded once where the machine can. Left to the compiler, it would fuse here and not there, and a row would
// get other bits when it is computed alone than among others.
template <class V>
static inline V add_product(V sum, V b, float f) {
#if QUIRE_ISA >= 2
  static_assert(sizeof(V) == 64, "a register");
  return (V)_mm512_fmadd_ps((__m512)b, _mm512_set1_ps(f), (__m512)sum);
#elif QUIRE_ISA == 1
  EightFloats sums[sizeof(V) / 32], factors[sizeof(V) / 32];
  memcpy(sums, &sum, sizeof(V));
  memcpy(factors, &b, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / 32; i++)
    sums[i] = (EightFloats)_mm256_fmadd_ps((__m256)factors[i], _mm256_set1_ps(f), (__m256)sums[i]);
  memcpy(&sum, sums, sizeof(V));
  return sum;
#else
  return sum + b * f;
#endif
}

// A unit is 4 bytes: one float, or a pair of bf16 that are multiplied together and added.
struct FloatUnits {
  typedef float Element;
  static constexpr int PER_UNIT = 1;
  template <class V, class I>
  static inline V step(V sum, I b, int32_t a) {
    float f;
    memcpy(&f, &a, 4);
    return add_product(sum, (V)b, f);
  }
  static inline void store_weights(float* p, Floats x) { store(p, x); }
  static inline Ints first_only(Ints b) { return b; }
};

struct Bf16Units {
  typedef Bf16 Element;
  static constexpr int PER_UNIT = 2;
  template <class V, class I>
  static inline V step(V sum, I b, int32_t a) {
#if QUIRE_ISA >= 3
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(a));
#else
    const uint32_t first = (uint32_t)a << 16, second = (uint32_t)a & 0xffff0000;
    float f, g;
    memcpy(&f, &first, 4);
    memcpy(&g, &second, 4);
    sum = add_product(sum, (V)(b << 16), f);
    return add_product(sum, (V)(b & (int32_t)0xffff0000), g);
#endif
  }
  static inline void store_weights(Bf16* p, Floats x) { store(p, x); }
  static inline Ints first_only(Ints b) { return b & 0xffff; }
};

// sum + four bytes of each lane of b, from 0 to 255, by the four int8 of a: exact.
template <class I>
static inline I add_bytes(I sum, I b, int32_t a) {
#if QUIRE_ISA >= 3
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32(a));
#elif QUIRE_ISA == 2
  const __m512i x = _mm512_set1_epi32(a), even = _mm512_and_si512((__m512i)b, _mm512_set1_epi16(255));
  const __m512i odd = _mm512_srli_epi16((__m512i)b, 8);
  const __m512i by_even = _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  return sum + (I)_mm512_add_epi32(by_even, _mm512_madd_epi16(odd, _mm512_srai_epi16(x, 8)));
#elif QUIRE_ISA == 1
  const __m256i x = _mm256_set1_epi32(a), even = _mm256_and_si256((__m256i)b, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16((__m256i)b, 8);
  const __m256i by_even = _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return sum + (I)_mm256_add_epi32(by_even, _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8)));
#else
  for (int i = 0; i < 4; i++) sum += ((b >> (8 * i)) & 255) * (int32_t)(int8_t)(a >> (8 * i));
  return sum;
#endif
}

// A unit is four weights of 8 bits, 128 added; sums are int32, as the bits of floats.
struct ByteUnits {
  template <class V, class I>
  static inline V step(V sum, I b, int32_t a) {
    return (V)add_bytes((I)sum, b, a);
  }
};

// Sums stay in registers of the machine's own width; a Floats is PARTS of them.
#if QUIRE_ISA >= 2
constexpr int WIDTH = 16;
#elif QUIRE_ISA == 1
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;
typedef float Register __attribute__((vector_size(4 * WIDTH)));
typedef int32_t RegisterInts __attribute__((vector_size(4 * WIDTH)));
typedef int32_t RegisterIntsAt __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

// sums[r][c] += a[r][s] * b[c][s * stride ...] over `steps` units, in order. With AHEAD, it also asks for the memory
// that is wanted next, `ahead_bytes` at `ahead` for each step and column.
template <class E, bool AHEAD, int R, int C>
static inline void products(Floats (&sums)[R][C], const int32_t* const* a, const int32_t* const* b, int64_t steps,
                            int64_t stride, const int32_t* const* ahead, int64_t ahead_bytes) {
  Register parts[R][C * PARTS];
  memcpy(parts, sums, sizeof(sums));
  for (int64_t s = 0; s < steps; s++) {
    for (int c = 0; c < C; c++) {
      if (AHEAD) {
        const char* next = (const char*)ahead[c] + s * ahead_bytes;
        for (int64_t i = 0; i < ahead_bytes; i += 64) __builtin_prefetch(next + i);
      }
      for (int p = 0; p < PARTS; p++) {
        const RegisterInts column = *(const RegisterIntsAt*)(b[c] + s * stride + p * WIDTH);
        for (int r = 0; r < R; r++) parts[r][c * PARTS + p] = E::step(parts[r][c * PARTS + p], column, a[r][s]);
      }
    }
  }
  memcpy(sums, parts, sizeof(sums));
}

#if QUIRE_ISA >= 4
// What AMX's eight tiles hold, up to 16 rows of up to 64 bytes each.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
#endif
