// Blocks of dot products over units, for one instruction set.

#include "vectors.inl"

// Sums stay in registers of the machine's own width; a Floats is PARTS of them.
constexpr int PARTS = LANES / WIDTH;
typedef float Register __attribute__((vector_size(4 * WIDTH)));
typedef float RegisterAt __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t RegisterInts __attribute__((vector_size(4 * WIDTH)));
typedef int32_t RegisterIntsAt __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static inline RegisterInts everywhere(int32_t x) { return RegisterInts{} + x; }

// sum + a * b, rounded once where the machine can. Left to the compiler, it would fuse here and not there, and a row would
// get other bits when it is computed alone than among others.
static inline Register add_product(Register sum, Register a, Register b) {
#if QUIRE_ISA >= 2
  return (Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif QUIRE_ISA == 1
  return (Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

// sum + the two int16 of each lane of a by those of b, which do not overflow together. The empty statement keeps the
// compiler from collecting products first, which takes more registers than there are.
static inline RegisterInts add_shorts(RegisterInts sum, RegisterInts a, RegisterInts b) {
#if QUIRE_ISA >= 2
  sum += (RegisterInts)_mm512_madd_epi16((__m512i)a, (__m512i)b);
  __asm__ volatile("" : "+v"(sum));
#elif QUIRE_ISA == 1
  sum += (RegisterInts)_mm256_madd_epi16((__m256i)a, (__m256i)b);
  __asm__ volatile("" : "+x"(sum));
#else
  sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  return sum;
}

// Kinds of units, which are 4 bytes of a weight and WORDS of x. A unit is multiplied in HALVES: part `h` of its column by
// part `h` of its x, which is the same for all lanes.

struct FloatUnits {
  typedef float Element, Input;
  static constexpr int PER_UNIT = 1, WORDS = 1, HALVES = 1;
  static inline RegisterInts half(RegisterInts b, int) { return b; }
  static inline RegisterInts input(const int32_t* x, int) { return everywhere(*x); }
  static inline Register add(Register sum, RegisterInts b, RegisterInts x) {
    return add_product(sum, (Register)b, (Register)x);
  }
  static inline Ints first_only(Ints b) { return b; }
};

// A pair of bf16, by another one; or by two floats, where there are no products of bf16.
struct Bf16Units {
  typedef Bf16 Element;
  static constexpr int PER_UNIT = 2;
#if QUIRE_ISA >= 3
  typedef Bf16 Input;
  static constexpr int WORDS = 1, HALVES = 1;
  static inline RegisterInts half(RegisterInts b, int) { return b; }
  static inline RegisterInts input(const int32_t* x, int) { return everywhere(*x); }
  static inline Register add(Register sum, RegisterInts b, RegisterInts x) {
    return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)x);
  }
#else
  typedef float Input;
  static constexpr int WORDS = 2, HALVES = 2;
  static inline RegisterInts half(RegisterInts b, int h) { return h ? b & (int32_t)0xffff0000 : b << 16; }
  static inline RegisterInts input(const int32_t* x, int h) { return everywhere(x[h]); }
  static inline Register add(Register sum, RegisterInts b, RegisterInts x) {
    return add_product(sum, (Register)b, (Register)x);
  }
#endif
  static inline Ints first_only(Ints b) { return b & 0xffff; }
};

// Columns of LANES that so many rows have sums for in so many registers. The fewer rows, the more, so that sums do not
// wait for each other, and the weight is read in order.
constexpr int columns_of(int rows, int registers) {
  const int most = registers / (rows * PARTS);
  return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with `count`, from 1 to MOST, as a Constant.
template <int MOST, class F>
static inline void with_rows(int64_t count, F f) {
  if (count == MOST) return f(Constant<MOST>{});
  if constexpr (MOST > 1) with_rows<MOST - 1>(count, f);
}

static inline Register load_register(const float* p) { return *(const RegisterAt*)p; }
static inline void store_register(float* p, Register x) { *(RegisterAt*)p = x; }

// Into the first cache, or into the second.
static inline void ask_for_line(const char* line, bool near) {
  near ? __builtin_prefetch(line) : __builtin_prefetch(line, 0, 2);
}

// Memory that is asked for while something else is computed: so many lines a step, so that none of them is waited for.
struct Ahead {
  const char* next;
  int64_t lines;
  const char* end;
  bool near;
  // For a part that passes by so many columns of LANES, of which it asks for no more lines than those.
  inline Ahead of_columns(int64_t columns) const { return {next, lines < columns ? lines : columns, end, near}; }
  inline void ask() {
    for (int64_t i = 0; i < lines && next < end; i++, next += 64) ask_for_line(next, near);
  }
};

// sums[r][c * PARTS ...] += a[r][s * WORDS ...] * b[c][s * stride ...] over `steps` units, in order; before each of them,
// ask(s) asks for memory that is wanted later. Loops are unrolled by hand where the compiler would otherwise leave sums in
// memory.
template <class E, int R, int P, class Ask>
static inline void products(Register (&sums)[R][P], const int32_t* const* a, const int32_t* const* b, int64_t steps,
                            int64_t stride, Ask ask) {
  for (int64_t s = 0; s < steps; s++) {
    ask(s);
    RegisterInts columns[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
      columns[p] = *(const RegisterIntsAt*)(b[p / PARTS] + s * stride + p % PARTS * WIDTH);
#pragma GCC unroll 2
    for (int h = 0; h < E::HALVES; h++) {
      RegisterInts some[P];
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) some[p] = E::half(columns[p], h);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const RegisterInts x = E::input(a[r] + s * E::WORDS, h);
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) sums[r][p] = E::add(sums[r][p], some[p], x);
      }
    }
  }
}

#if QUIRE_ISA >= 4
// What AMX's eight tiles hold, up to 16 rows of up to 64 bytes each.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// As _tile_loadconfig, of which GCC says that it reads 8 bytes.
static inline void use_tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }

// What was written so far is in memory from here on. GCC does not say of _tile_loadd that it reads any.
static inline void finish_writes() { __asm__ volatile("" ::: "memory"); }
#endif
