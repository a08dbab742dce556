// Numbers of 8 and 4 bits, for one instruction set. See quantized.cpp.

#include "products.inl"
#include "tiles.inl"

typedef int8_t Chars __attribute__((vector_size(16)));
typedef int8_t CharsAt __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int16_t ShortsAt __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int GROUP_VECTORS = GROUP / LANES;
#if QUIRE_ISA >= 2
constexpr int NIBBLE_ROWS = 4, NIBBLE_SUMS = 16;  // registers of sums; as many again for what becomes of them
#elif QUIRE_ISA == 1
constexpr int NIBBLE_ROWS = 4, NIBBLE_SUMS = 8;
#else
constexpr int NIBBLE_ROWS = 2, NIBBLE_SUMS = 8;
#endif

// sum + four bytes of each lane of b, from 0 to 15, by the four int8 of a: exact. Before products of bytes were summed as
// int32, a lane of the sum is two int16, which hold EXACT_UNITS of both halves of a unit.
#if QUIRE_ISA >= 3
constexpr int EXACT_UNITS = GROUP / 8;
static inline RegisterInts add_nibbles(RegisterInts sum, RegisterInts b, RegisterInts a) {
  return (RegisterInts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
}
static inline RegisterInts add_exact(RegisterInts sum, RegisterInts some) { return sum + some; }
#elif QUIRE_ISA >= 1
constexpr int EXACT_UNITS = 4;  // 2 * 4 * 2 * 15 * 127 < 2^15
static inline RegisterInts add_nibbles(RegisterInts sum, RegisterInts b, RegisterInts a) {
#if QUIRE_ISA == 2
  sum = (RegisterInts)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)b, (__m512i)a));
  __asm__ volatile("" : "+v"(sum));  // as in add_shorts
#else
  sum = (RegisterInts)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)b, (__m256i)a));
  __asm__ volatile("" : "+x"(sum));
#endif
  return sum;
}
static inline RegisterInts add_exact(RegisterInts sum, RegisterInts some) {
  return add_shorts(sum, some, everywhere(0x00010001));
}
#else
constexpr int EXACT_UNITS = GROUP / 8;
static inline RegisterInts add_nibbles(RegisterInts sum, RegisterInts b, RegisterInts a) {
  for (int i = 0; i < 4; i++) sum += ((b >> (8 * i)) & 255) * (a << (24 - 8 * i) >> 24);
  return sum;
}
static inline RegisterInts add_exact(RegisterInts sum, RegisterInts some) { return sum + some; }
#endif

// Sixteen numbers, in registers of the machine's own width.
struct Sixteen {
  Register part[PARTS];
};
struct SixteenInts {
  RegisterInts part[PARTS];
};

#if QUIRE_ISA >= 2
static inline Register load_register(const Bf16* p) { return load(p); }
#else
static inline Register load_register(const Bf16* p) {
  typedef uint16_t Some __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
  typedef uint32_t Wide __attribute__((vector_size(4 * WIDTH)));
  return (Register)(__builtin_convertvector(*(const Some*)p, Wide) << 16);
}
#endif

// A row of `count` inputs, sixteen at a time; past its end there are zeros. Loops have no case of their own for those, with
// which a compiler would keep their sums in memory.
template <class T>
struct Inputs {
  const T* row;
  int64_t whole;
  T last[2 * LANES] = {};
  Inputs(const T* row, int64_t count) : row(row), whole(count / LANES * LANES) {
    if (count > whole) memcpy(last, row + whole, (count - whole) * sizeof(T));
  }
  inline Sixteen at(int64_t first) const {
    const T* from = first < whole ? row + first : last + (first > whole ? LANES : 0);
    Sixteen x;
    for (int p = 0; p < PARTS; p++) x.part[p] = load_register(from + p * WIDTH);
    return x;
  }
};

#if QUIRE_ISA < 2
static inline Register larger(Register a, Register b) {
#if QUIRE_ISA == 1
  return (Register)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
#endif
static inline int32_t sum(const SixteenInts& x) {
  RegisterInts all{};
  for (RegisterInts part : x.part) all += part;
  return sum(all);
}

// x * factor to the nearest integer, ties to even. Not by adding a large number, which the compiler might fuse with a
// product.
static inline SixteenInts nearest(const Sixteen& x, float factor) {
  SixteenInts y;
  for (int p = 0; p < PARTS; p++) {
    const Register scaled = x.part[p] * factor;
#if QUIRE_ISA >= 2
    y.part[p] = (RegisterInts)_mm512_cvtps_epi32((__m512)scaled);
#elif QUIRE_ISA == 1
    y.part[p] = (RegisterInts)_mm256_cvtps_epi32((__m256)scaled);
#else
    for (int i = 0; i < WIDTH; i++) y.part[p][i] = (int32_t)__builtin_rintf(scaled[i]);
#endif
  }
  return y;
}

// Of numbers that fit.
static inline Chars as_chars(const SixteenInts& x) {
#if QUIRE_ISA >= 2
  return (Chars)_mm512_cvtepi32_epi8((__m512i)x.part[0]);
#elif QUIRE_ISA == 1
  const __m256i both = _mm256_packs_epi32((__m256i)x.part[0], (__m256i)x.part[1]);
  const __m256i shorts = _mm256_permute4x64_epi64(both, 0xd8);
  return (Chars)_mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
#else
  Chars y;
  for (int i = 0; i < LANES; i++) y[i] = (int8_t)x.part[i / WIDTH][i % WIDTH];
  return y;
#endif
}

// The greatest magnitude of a row; not a number if any of them is none, or infinite.
template <class T>
static inline float greatest(const Inputs<T>& row, int64_t count) {
  Register most{}, nothing{};
  for (int64_t k = 0; k < count; k += LANES) {
    const Sixteen x = row.at(k);
    for (Register part : x.part) {
      most = larger(most, magnitude(part));
      nothing += part * 0.0f;
    }
  }
  return largest(most) + sum(nothing);
}

// A row with what is not a number, or infinite, becomes zeros with a scale that is none, and so are its products.
template <class T, bool GROUPED>
static inline void quantize_row_of(const Rows& a, const T* x, int64_t row) {
  constexpr int64_t SIZE = GROUPED || QUIRE_ISA >= 3 ? 1 : 2;  // bytes of a number
  const Inputs<T> given(x, a.inputs);
  const float top = greatest(given, a.inputs), inverse = top > 0 ? 127.0f / top : 0;
  const Inputs<T> inputs(x, top == top ? a.inputs : 0);
  const int64_t padded = a.padded, part = GROUPED ? GROUP : padded;
  char* out = a.out + row * padded * SIZE;
  int32_t* sums = a.sums + row * (padded / part);
  a.scales[row] = top / 127.0f;
  for (int64_t first = 0; first < padded; first += part) {
    const int64_t end = first + part < padded ? first + part : padded;  // a cache's rows may end in a group
    SixteenInts total{};
    for (int64_t k = first; k < end; k += LANES) {
      const SixteenInts numbers = nearest(inputs.at(k), inverse);
      const Chars whole = as_chars(numbers);
      if constexpr (SIZE == 1) {
        *(CharsAt*)(out + k) = whole;
      } else {  // as ByteUnits of linear.inl take them
        const Shorts wide = __builtin_convertvector(whole, Shorts);
        *(ShortsAt*)(out + 2 * k) =
            __builtin_shufflevector(wide, wide, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
      }
      for (int p = 0; p < PARTS; p++) total.part[p] += numbers.part[p];
    }
    *sums++ = sum(total);
  }
}

template <class T>
static inline void quantize_row_of(const Rows& a, const void* x, int64_t row) {
  if (a.grouped) {
    quantize_row_of<T, true>(a, (const T*)x, row);
  } else {
    quantize_row_of<T, false>(a, (const T*)x, row);
  }
}

static inline void quantize_row(const Rows& a, int64_t row) {
  const char* x = (const char*)a.x + (a.of ? a.of[row] : row) * a.x_stride_bytes;
  if (a.is_bf16) {
    quantize_row_of<Bf16>(a, x, row);
  } else {
    quantize_row_of<float>(a, x, row);
  }
}

// 64 outputs of 8 bits. Rows past the last are zeros, and so are inputs.
template <class T>
static void pack_bytes_of(const Weight& a, int64_t block) {
  uint8_t* packed = (uint8_t*)a.packed + block * a.padded * BLOCK;
  float* scales = (float*)a.scales + block * BLOCK;
  for (int64_t i = 0; i < BLOCK; i++) {
    const int64_t row = block * BLOCK + i, inputs = row < a.outputs ? a.inputs : 0;
    const T* weight = (const T*)a.weight + (inputs ? row * a.inputs : 0);
    const Inputs<T> numbers(weight, inputs);
    const float top = greatest(numbers, inputs), inverse = top > 0 ? 127.0f / top : 0;
    scales[i] = top / 127.0f;
    for (int64_t k = 0; k < a.padded; k += LANES) {
      const Chars whole = as_chars(nearest(numbers.at(k), inverse)) ^ (int8_t)-128;  // + 128, as uint8
      for (int64_t u = 0; u < LANES; u += 4) memcpy(packed + ((k + u) / 4 * BLOCK + i) * 4, (const char*)&whole + u, 4);
    }
  }
}

static void pack_bytes(const Weight& a, int64_t block) {
  if (a.is_bf16) {
    pack_bytes_of<Bf16>(a, block);
  } else {
    pack_bytes_of<float>(a, block);
  }
}

// Whole numbers between -8 and 7.
static inline Register nibbles(Register x, float inverse) {
  x = x * inverse;
#if QUIRE_ISA >= 2
  const __m512 y = _mm512_max_ps(_mm512_min_ps((__m512)x, _mm512_set1_ps(7)), _mm512_set1_ps(-8));
  return (Register)_mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif QUIRE_ISA == 1
  const __m256 y = _mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(7)), _mm256_set1_ps(-8));
  return (Register)_mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < WIDTH; i++) x[i] = __builtin_rintf(x[i] > 7 ? 7 : x[i] < -8 ? -8 : x[i]);
  return x;
#endif
}

// As bf16; to the nearest, ties to even.
static inline float rounded(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  if (x == x) word = (word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000;
  memcpy(&x, &word, 4);
  return x;
}

// The scale of 64 numbers, rounded to bf16, that leaves the least square error. The greatest number becomes -8 or 7, or
// something between that and the range's end, or beyond it, which cuts it off to be finer elsewhere.
static inline float group_scale(const Sixteen (&x)[GROUP_VECTORS]) {
  Register numbers[GROUP / WIDTH];
  memcpy(numbers, x, sizeof(numbers));
  Register high = numbers[0], low = -numbers[0], nothing{};
  for (Register number : numbers) {
    high = larger(high, number);
    low = larger(low, -number);
    nothing += number * 0.0f;
  }
  const float top = largest(high), bottom = largest(low), extreme = top > bottom ? top : -bottom;
  const float places[] = {-8.0f, -8.6f, -9.3f, -7.4f, 7.0f, 7.5f, 8.2f};
  float least = INFINITY, best = sum(nothing);  // not a number if any is none, or infinite
  for (float place : places) {
    const float scale = rounded(extreme / place), inverse = scale != 0 ? 1.0f / scale : 0;
    Register error[PARTS] = {};
    for (int i = 0; i < GROUP / WIDTH; i++) {
      const Register off = add_product(-numbers[i], nibbles(numbers[i], inverse), Register{} + scale);
      error[i % PARTS] = add_product(error[i % PARTS], off, off);
    }
    Floats errors;
    memcpy(&errors, error, sizeof(errors));
    const float found = sum(errors);
    if (found < least) {
      least = found;
      best = scale;
    }
  }
  return best;
}

template <class T>
static void pack_nibbles_of(const Weight& a, int64_t block) {
  char* packed = (char*)a.packed + block * a.padded / 2 * BLOCK;
  uint16_t* scales = (uint16_t*)a.scales + block * (a.padded / GROUP) * BLOCK;
  for (int64_t i = 0; i < BLOCK; i++) {
    const int64_t row = block * BLOCK + i, inputs = row < a.outputs ? a.inputs : 0;
    const T* weight = (const T*)a.weight + (inputs ? row * a.inputs : 0);
    const Inputs<T> numbers(weight, inputs);
    for (int64_t group = 0; group < a.padded / GROUP; group++) {
      Sixteen x[GROUP_VECTORS];
      for (int v = 0; v < GROUP_VECTORS; v++) x[v] = numbers.at(group * GROUP + v * LANES);
      const float scale = group_scale(x), inverse = scale != 0 ? 1.0f / scale : 0;
      uint32_t bits, codes[GROUP / 4];
      memcpy(&bits, &scale, 4);
      scales[group * BLOCK + i] = bits >> 16;
      for (int v = 0; v < GROUP_VECTORS; v++) {
        for (Register& number : x[v].part) number = nibbles(number, inverse) + 8.0f;
        const Chars some = as_chars(nearest(x[v], 1.0f));
        memcpy(codes + v * 4, &some, sizeof(some));
      }
      for (int64_t u = 0; u < GROUP / 8; u++) {
        const uint32_t both = codes[2 * u] | codes[2 * u + 1] << 4;
        memcpy(packed + ((group * (GROUP / 8) + u) * BLOCK + i) * 4, &both, 4);
      }
    }
  }
}

static void pack_nibbles(const Weight& a, int64_t block) {
  if (a.is_bf16) {
    pack_nibbles_of<Bf16>(a, block);
  } else {
    pack_nibbles_of<float>(a, block);
  }
}

// whole[r][p] += EXACT_UNITS units of a weight by those of x[r] from `at` on. Asks on for what comes later, or, if the weight
// STREAMS, for what it takes itself soon.
template <bool STREAMS, int R, int P>
static inline void nibble_units(RegisterInts (&whole)[R][P], const int32_t* weight, const int32_t* const* x, int64_t at,
                                Ahead& later) {
  RegisterInts some[R][P] = {};
  for (int u = 0; u < EXACT_UNITS; u++) {
    RegisterInts both[P];
    if (!STREAMS) later.ask();
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      if (STREAMS) __builtin_prefetch(weight + u * BLOCK + p * WIDTH + AHEAD_UNITS);
      both[p] = *(const RegisterIntsAt*)(weight + u * BLOCK + p * WIDTH);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      RegisterInts half[P];
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) half[p] = (h ? both[p] >> 4 : both[p]) & 0x0f0f0f0f;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const RegisterInts input = everywhere(x[r][at + 2 * u + h]);
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) some[r][p] = add_nibbles(some[r][p], half[p], input);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) whole[r][p] = add_exact(whole[r][p], some[r][p]);
}

// Columns column .. of rows row .. row + R - 1: sums [R][64] of products with their scales. Not inlined:
// other loops would take its registers.
template <bool STREAMS, int R>
__attribute__((noinline)) static void nibble_rows(const Product& a, int64_t block, int64_t row, int64_t column,
                                                  float* sums, Ahead& later) {
  constexpr int COLUMNS = columns_of(R, NIBBLE_SUMS), PIECES = COLUMNS * PARTS;
  typedef uint16_t Scales __attribute__((vector_size(2 * WIDTH)));
  typedef uint16_t ScalesAt __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
  typedef uint32_t RegisterWords __attribute__((vector_size(4 * WIDTH)));
  const int64_t groups = a.padded / GROUP, units = a.padded / 8;
  const int32_t* weight = a.weight + block * units * BLOCK + column;
  const uint16_t* scales = a.scales + block * groups * BLOCK + column;
  const int32_t* x[R];
  for (int r = 0; r < R; r++) x[r] = (const int32_t*)(a.x + (row + r) * a.padded);
  Register total[R][PIECES] = {};
  Ahead ahead = later.of_columns(COLUMNS);
  for (int64_t group = 0; group < groups; group++) {
    RegisterInts whole[R][PIECES] = {};
    for (int64_t unit = group * (GROUP / 8); unit < (group + 1) * (GROUP / 8); unit += EXACT_UNITS)
      nibble_units<STREAMS>(whole, weight + unit * BLOCK, x, 2 * unit, ahead);
    for (int p = 0; p < PIECES; p++) {
      const Scales bits = *(const ScalesAt*)(scales + group * BLOCK + p * WIDTH);
      const Register scale = (Register)(__builtin_convertvector(bits, RegisterWords) << 16);
      for (int r = 0; r < R; r++) {
        const RegisterInts off = whole[r][p] - 8 * a.x_sums[(row + r) * groups + group];
        total[r][p] = add_product(total[r][p], __builtin_convertvector(off, Register), scale);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < PIECES; p++) store_register(sums + r * BLOCK + column + p * WIDTH, total[r][p]);
  later.next = ahead.next;
}

#if QUIRE_ISA >= 4
constexpr int64_t LEAST_TILE_ROWS = 5;  // with fewer, vectors are as fast

// A group of 64 columns as tiles take it: int8 [16][64][4].
static inline void expand_nibbles(const int32_t* weight, int8_t* bytes) {
  const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  for (int64_t u = 0; u < GROUP / 8; u++)
    for (int64_t c = 0; c < BLOCK; c += LANES) {
      const __m512i both = _mm512_loadu_si512(weight + u * BLOCK + c);
      int8_t* to = bytes + (2 * u * BLOCK + c) * 4;
      _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(both, low), eight));
      _mm512_store_si512(to + BLOCK * 4, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), eight));
    }
}

static void nibble_sums_by_tiles(const Product& a, int64_t block, int64_t top, int64_t rows, float* sums) {
  const int64_t groups = a.padded / GROUP;
  const int32_t* weight = a.weight + block * groups * (GROUP / 8) * BLOCK;
  const uint16_t* scales = a.scales + block * groups * BLOCK;
  alignas(64) int8_t bytes[GROUP * BLOCK];
  alignas(64) float some[2 * TILE_ROWS * BLOCK];
  int64_t configured = 0;
  memset(sums, 0, rows * BLOCK * 4);
  for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS, sums += 2 * TILE_ROWS * BLOCK) {
    const int64_t count = rows - r < 2 * TILE_ROWS ? rows - r : 2 * TILE_ROWS;
    if (count != configured) configure_tiles(configured = count);
    for (int64_t group = 0; group < groups; group++) {
      const int32_t* from = weight + group * (GROUP / 8) * BLOCK;
      if (top == 0 && r == 0)
        for (int64_t u = 0; u < GROUP / 8 * BLOCK; u += 16) __builtin_prefetch(from + u + AHEAD_UNITS);
      expand_nibbles(from, bytes);
      const char* x = (const char*)a.x + (top + r) * a.padded + group * GROUP;
      tile_products<NIBBLES>(x, a.padded, count, (const char*)bytes, TILE_UNITS, some, [](const char*, int) {});
      for (int64_t c = 0; c < BLOCK; c += LANES) {
        const Register scale = (Register)load((const Bf16*)scales + group * BLOCK + c);
        for (int64_t i = c; i < count * BLOCK; i += BLOCK) {
          const Register whole = __builtin_convertvector((RegisterInts)load_register(some + i), Register);
          store_register(sums + i, add_product(load_register(sums + i), whole, scale));
        }
      }
    }
  }
  _tile_release();
}
#endif

// 64 outputs of rows top .. top + rows - 1, not finished: sums [rows][64]. Where few rows at a time pass by the weight more than
// once, each of these asks for a share of the next block, so that memory is never idle; not on cores that ask far, where
// nobody has measured it.
static void nibble_sums(const Product& a, int64_t block, int64_t top, int64_t rows, float* sums) {
#if QUIRE_ISA >= 4
  if (a.rows >= LEAST_TILE_ROWS) return nibble_sums_by_tiles(a, block, top, rows, sums);
#endif
  const int64_t block_units = a.padded / 8 * BLOCK, passes = (rows + NIBBLE_ROWS - 1) / NIBBLE_ROWS;
  const bool asks = !top && !ASKS_FAR, streams = asks && passes == 1;
  const char* next = (const char*)(a.weight + (block + 1) * block_units);
  Ahead later{next, asks ? (BLOCK / LANES + passes - 1) / passes : 0, next + block_units * 4, true};
  for (int64_t r = 0; r < rows; r += NIBBLE_ROWS) {
    const int64_t count = rows - r < NIBBLE_ROWS ? rows - r : NIBBLE_ROWS;
    with_rows<NIBBLE_ROWS>(count, [&](auto n) {
      constexpr int R = decltype(n)::value;
      for (int64_t column = 0; column < BLOCK; column += columns_of(R, NIBBLE_SUMS) * LANES) {
        if (streams) {
          nibble_rows<true, R>(a, block, 0, column, sums, later);
        } else {
          nibble_rows<false, R>(a, block, top + r, column, sums + r * BLOCK, later);
        }
      }
    });
  }
}
