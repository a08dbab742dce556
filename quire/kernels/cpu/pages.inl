// Pages of a cache as products take them, for one instruction set; after products.inl. E: units of products.

// Numbers of int8 as the bits of floats.
static inline RegisterInts widened(const int8_t* p) {
#if QUIRE_ISA >= 2
  return (RegisterInts)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif QUIRE_ISA == 1
  return (RegisterInts)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return (RegisterInts) __builtin_convertvector(RegisterInts{p[0], p[1], p[2], p[3]}, Register);
#endif
}

// `count` times 16 units; the numbers of a unit are `apart`.
template <class E>
static inline void widen(int32_t* to, const int8_t* from, int64_t count, int64_t step, int64_t apart) {
  typedef uint32_t RegisterWords __attribute__((vector_size(4 * WIDTH)));
  for (int64_t i = 0; i < count; i++) {
    for (int64_t u = 0; u < LANES; u += WIDTH) {
      RegisterInts units = widened(from + i * step + u);
      if (E::PER_UNIT == 2) {
        const RegisterInts second = widened(from + i * step + apart + u) & (int32_t)0xffff0000;
        units = (RegisterInts)((RegisterWords)units >> 16) | second;
      }
      *(RegisterIntsAt*)(to + i * LANES + u) = units;
    }
  }
}

// A key's second part, from `first` on, becomes multiples of its first scale, so that scores meet one.
template <class E>
static inline void widen_second_part(int32_t* to, const int8_t* keys, const float* scales, int64_t first, int64_t stored) {
  const Floats ratio = load(scales + LANES) / load(scales);
  for (int64_t d = first; d < stored; d++) {
    Floats x;
    for (int t = 0; t < LANES; t++) x[t] = (float)keys[d * LANES + t];
    typename E::Element numbers[LANES];
    store(numbers, x * ratio);
    auto* of_unit = (typename E::Element*)(to + d / E::PER_UNIT * LANES) + d % E::PER_UNIT;
    for (int t = 0; t < LANES; t++) of_unit[t * E::PER_UNIT] = numbers[t];
  }
}

// The values inside keys [unit][token] as [token unit][dim].
template <class E>
static inline void transpose_page(int32_t* to, const int32_t* keys, int64_t stored) {
  for (int64_t u = 0; u < stored / E::PER_UNIT; u++) {
    const int32_t* from = keys + u * LANES;
    if (E::PER_UNIT == 1) {
      for (int t = 0; t < LANES; t++) to[t * stored + u] = from[t];
    } else {
      for (int t = 0; t < LANES / 2; t++) {
        const uint32_t even = from[2 * t], odd = from[2 * t + 1];
        to[t * stored + 2 * u] = (even & 0xffff) | odd << 16;
        to[t * stored + 2 * u + 1] = even >> 16 | (odd & 0xffff0000);
      }
    }
  }
}
