// Blocks of dot products over units, for one instruction set.

#include "vectors.inl"

// A unit is 4 bytes: one float, or a pair of bf16 that are multiplied together and added.
struct FloatUnits {
  typedef float Element;
  static constexpr int PER_UNIT = 1;
  template <class V, class I>
  static inline V step(V sum, I b, int32_t a) {
    float f;
    memcpy(&f, &a, 4);
    return sum + (V)b * f;
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
    int32_t first = a << 16, second = a & 0xffff0000;
    float f, g;
    memcpy(&f, &first, 4);
    memcpy(&g, &second, 4);
    sum = sum + (V)(b << 16) * f;
    return sum + (V)(b & (int32_t)0xffff0000) * g;
#endif
  }
  static inline void store_weights(Bf16* p, Floats x) { store(p, x); }
  static inline Ints first_only(Ints b) { return b & 0xffff; }
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

// Hides from the compiler how a sum came about. If it were a product, compilers could fuse either that product or the
// next one into the addition, and choose differently for one row and for four: the same row would get other bits.
static inline void as_is(Register& x) {
#if QUIRE_ISA >= 2
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// sums[r][c] += a[r][s] * b[c][s * stride ...] over `steps` units, in order. With AHEAD, it also asks for the memory
// that is wanted next, `ahead_bytes` at `ahead` for each step and column.
template <class E, bool AHEAD, int R, int C>
static inline void products(Floats (&sums)[R][C], const int32_t* const* a, const int32_t* const* b, int64_t steps,
                            int64_t stride, const int32_t* const* ahead, int64_t ahead_bytes) {
  Register parts[R][C * PARTS];
  memcpy(parts, sums, sizeof(sums));
  for (int r = 0; r < R; r++)
    for (int i = 0; i < C * PARTS; i++) as_is(parts[r][i]);
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
