// Row-wise operations for one instruction set. See elementwise.cpp.

#include "vectors.inl"
#include "activations.inl"

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

// Elements i and half + i of a head, which turn together.
struct Apart {
  template <class T>
  static inline void get_pairs(const T* p, int64_t i, int64_t n, int64_t half, Floats& a, Floats& b) {
    a = get(p + i, n);
    b = get(p + half + i, n);
  }
  template <class T>
  static inline void put_pairs(T* p, int64_t i, int64_t n, int64_t half, Floats a, Floats b) {
    put(p + i, a, n);
    put(p + half + i, b, n);
  }
};

// Elements 2 * i and 2 * i + 1.
struct Neighbours {
  template <class T>
  static inline void get_pairs(const T* p, int64_t i, int64_t n, int64_t half, Floats& a, Floats& b) {
    const int64_t first = 2 * n < LANES ? 2 * n : LANES;
    float pairs[2 * LANES], of_a[LANES], of_b[LANES];
    store(pairs, get(p + 2 * i, first));
    store(pairs + LANES, get(p + 2 * i + first, 2 * n - first));
    for (int lane = 0; lane < LANES; lane++) {
      of_a[lane] = pairs[2 * lane];
      of_b[lane] = pairs[2 * lane + 1];
    }
    a = load(of_a);
    b = load(of_b);
  }
  template <class T>
  static inline void put_pairs(T* p, int64_t i, int64_t n, int64_t half, Floats a, Floats b) {
    const int64_t first = 2 * n < LANES ? 2 * n : LANES;
    float pairs[2 * LANES];
    for (int lane = 0; lane < LANES; lane++) {
      pairs[2 * lane] = a[lane];
      pairs[2 * lane + 1] = b[lane];
    }
    put(p + 2 * i, load(pairs), first);
    put(p + 2 * i + first, load(pairs + LANES), 2 * n - first);
  }
};

// One head, in place: normalise by weight where given, then rotate the first 2 * half elements.
template <class P, class T>
static inline void norm_rope_head(T* x, const float* weight, int64_t size, float eps, const float* cos,
                                  const float* sin, int64_t half) {
  const float inverse = weight ? inverse_rms(x, size, eps) : 1.0f;
  FOR_LANES(i, n, half) {
    const Floats c = get(cos + i, n), s = get(sin + i, n);
    Floats a, b;
    P::get_pairs(x, i, n, half, a, b);
    if (weight) {
      Floats by_a, by_b;
      P::get_pairs(weight, i, n, half, by_a, by_b);
      a = a * inverse * by_a;
      b = b * inverse * by_b;
    }
    P::put_pairs(x, i, n, half, a * c - b * s, b * c + a * s);
  }
  if (!weight) return;
  const int64_t turned = 2 * half;
  FOR_LANES(i, n, size - turned) {
    put(x + turned + i, get(x + turned + i, n) * inverse * get(weight + turned + i, n), n);
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
  if (a.out) rms_norm_row((T*)a.out + row * a.size, total, (const T*)a.weight, a.size, a.eps, a.offset);
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

template <class P, class T>
static inline void norm_rope_of(const NormRope& a, int64_t row) {
  const float *cos = a.cos + a.positions[row] * a.half, *sin = a.sin + a.positions[row] * a.half;
  for (int64_t h = 0; h < a.num_heads; h++) {
    const float* weight = a.weight ? a.weight + h * a.size : nullptr;
    norm_rope_head<P>((T*)a.x + row * a.stride + h * a.size, weight, a.size, a.eps, cos, sin, a.half);
  }
}

static inline void norm_rope(const NormRope& a, int64_t row) {
  if (a.is_bf16) {
    a.interleaved ? norm_rope_of<Neighbours, Bf16>(a, row) : norm_rope_of<Apart, Bf16>(a, row);
  } else {
    a.interleaved ? norm_rope_of<Neighbours, float>(a, row) : norm_rope_of<Apart, float>(a, row);
  }
}

template <class T>
static inline void act_of(const Act& a, int64_t row) {
  const T* x = (const T*)a.x + row * a.size * (a.gated ? 2 : 1);
  act_row((T*)a.out + row * a.out_stride, x, a.gated ? x + a.size : nullptr, a.size, a.kind);
}

static inline void act(const Act& a, int64_t row) {
  if (a.is_bf16) {
    act_of<Bf16>(a, row);
  } else {
    act_of<float>(a, row);
  }
}
