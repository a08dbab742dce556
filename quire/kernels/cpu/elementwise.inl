// Row-wise operations for one instruction set. See elementwise.cpp.

#include "vectors.inl"

// f(values, i, n) for each 16 (or, at the end, n < 16) elements of a row.
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

template <class T>
static inline float inverse_rms(const T* x, int64_t size, float eps) {
  Floats squares = {};
  FOR_LANES(i, n, size) {
    const Floats v = get(x + i, n);
    squares = squares + v * v;
  }
  return 1.0f / sqrtf(sum(squares) / size + eps);
}

template <class T>
static inline void rms_norm_row(T* out, const T* x, const T* weight, int64_t size, float eps, float offset) {
  const float inverse = inverse_rms(x, size, eps);
  FOR_LANES(i, n, size) {
    Floats v = get(x + i, n) * inverse;
    if (weight) v = v * (get(weight + i, n) + offset);
    put(out + i, v, n);
  }
}

// One head, in place: normalise by weight where given, then rotate the first 2 * half elements.
template <class T>
static inline void norm_rope_head(T* x, const float* weight, int64_t size, float eps, const float* cos,
                                  const float* sin, int64_t half) {
  if (weight) {
    const float inverse = inverse_rms(x, size, eps);
    FOR_LANES(i, n, half) {
      const Floats a = get(x + i, n) * inverse * get(weight + i, n);
      const Floats b = get(x + half + i, n) * inverse * get(weight + half + i, n);
      const Floats c = get(cos + i, n), s = get(sin + i, n);
      put(x + i, a * c - b * s, n);
      put(x + half + i, b * c + a * s, n);
    }
    const int64_t turned = 2 * half;
    FOR_LANES(i, n, size - turned) {
      put(x + turned + i, get(x + turned + i, n) * inverse * get(weight + turned + i, n), n);
    }
    return;
  }
  FOR_LANES(i, n, half) {
    const Floats a = get(x + i, n), b = get(x + half + i, n), c = get(cos + i, n), s = get(sin + i, n);
    put(x + i, a * c - b * s, n);
    put(x + half + i, b * c + a * s, n);
  }
}

// Half of 1 + tanh(u) is sigmoid(2u), and half of 1 + erf(u) is half of erfc(-u): no cancellation.
static inline Floats activate(Floats x, int32_t kind) {
  const Floats zero = {};
  switch (kind) {
    case GELU_TANH: return x / (exp((x + x * x * x * 0.044715f) * -1.5957691216f) + 1.0f);
    case GELU: {  // Abramowitz and Stegun 7.1.26
      const Floats u = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (u * 0.3275911f + 1.0f);
      Floats p = fill(1.061405429f);
      p = p * t - 1.453152027f;
      p = p * t + 1.421413741f;
      p = p * t - 0.284496736f;
      p = p * t + 0.254829592f;
      const Floats tail = p * t * exp(-u * u) * 0.5f;
      return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    case RELU: return x < 0.0f ? zero : x;
    case RELU2: return x < 0.0f ? zero : x * x;
    case SIGMOID: return 1.0f / (exp(-x) + 1.0f);
    default: return x / (exp(-x) + 1.0f);
  }
}

template <class T>
static inline void act_row(T* out, const T* x, const T* up, int64_t size, int32_t kind) {
  FOR_LANES(i, n, size) {
    const Floats y = activate(get(x + i, n), kind);
    put(out + i, up ? y * get(up + i, n) : y, n);
  }
}

static inline void rms_norm(const RmsNorm& a, int64_t row) {
  if (a.is_bf16) {
    rms_norm_row((Bf16*)a.out + row * a.size, (const Bf16*)a.x + row * a.stride, (const Bf16*)a.weight, a.size,
                 a.eps, a.offset);
  } else {
    rms_norm_row((float*)a.out + row * a.size, (const float*)a.x + row * a.stride, (const float*)a.weight, a.size,
                 a.eps, a.offset);
  }
}

template <class T>
static inline void add_norm_of(const AddNorm& a, int64_t row) {
  const T *x = (const T*)a.x + row * a.x_stride, *residual = (const T*)a.residual + row * a.residual_stride;
  T* total = (T*)a.total + row * a.size;
  FOR_LANES(i, n, a.size) { put(total + i, get(residual + i, n) + get(x + i, n), n); }
  rms_norm_row((T*)a.out + row * a.size, total, (const T*)a.weight, a.size, a.eps, a.offset);
}

static inline void add_norm(const AddNorm& a, int64_t row) {
  if (a.is_bf16) {
    add_norm_of<Bf16>(a, row);
  } else {
    add_norm_of<float>(a, row);
  }
}

template <class T>
static inline void embed_of(const Embed& a, int64_t row) {
  constexpr int64_t PER_UNIT = 4 / sizeof(T), BLOCK = 64;  // as in linear.cpp
  const int64_t id = a.ids[row];
  const T* from = (const T*)a.table + (a.units ? id / BLOCK * a.units * BLOCK + id % BLOCK : 0) * PER_UNIT;
  T* to = (T*)a.out + row * a.size;
  if (a.units) {
    for (int64_t i = 0; i < a.size; i++) to[i] = from[i / PER_UNIT * BLOCK * PER_UNIT + i % PER_UNIT];
  } else {
    memcpy(to, from + id * a.size, a.size * sizeof(T));
  }
  if (a.scale == 1.0f) return;
  FOR_LANES(i, n, a.size) { put(to + i, get(to + i, n) * a.scale, n); }
}

static inline void embed(const Embed& a, int64_t row) {
  if (a.is_bf16) {
    embed_of<Bf16>(a, row);
  } else {
    embed_of<float>(a, row);
  }
}

static inline void norm_rope(const NormRope& a, int64_t row) {
  const float *cos = a.cos + a.positions[row] * a.half, *sin = a.sin + a.positions[row] * a.half;
  for (int64_t h = 0; h < a.num_heads; h++) {
    const int64_t at = row * a.stride + h * a.size;
    const float* weight = a.weight ? a.weight + h * a.size : nullptr;
    if (a.is_bf16) {
      norm_rope_head((Bf16*)a.x + at, weight, a.size, a.eps, cos, sin, a.half);
    } else {
      norm_rope_head((float*)a.x + at, weight, a.size, a.eps, cos, sin, a.half);
    }
  }
}

template <class T>
static inline void act_of(const Act& a, int64_t row) {
  const T* x = (const T*)a.x + row * a.size * (a.gated ? 2 : 1);
  act_row((T*)a.out + row * a.size, x, a.gated ? x + a.size : nullptr, a.size, a.kind);
}

static inline void act(const Act& a, int64_t row) {
  if (a.is_bf16) {
    act_of<Bf16>(a, row);
  } else {
    act_of<float>(a, row);
  }
}
