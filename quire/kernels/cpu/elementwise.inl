// Row-wise operations for one instruction set. See elementwise.cpp.

#include "vectors.inl"
#include "activations.inl"
#include "heads.inl"

template <class T>
static inline void rms_norm_row(T* out, const T* x, const T* weight, int64_t size, float eps, float offset) {
  const float inverse = inverse_rms(x, size, eps);
  FOR_LANES(i, n, size) {
    Floats v = get(x + i, n) * inverse;
    if (weight) v = v * (get(weight + i, n) + offset);
    put(out + i, v, n);
  }
}

template <class T>
static inline void act_row(T* out, const T* x, const T* up, int64_t size, int32_t kind) {
  FOR_LANES(i, n, size) {
    const Floats gate = get(x + i, n);
    put(out + i, up ? gated(gate, get(up + i, n), kind) : activate(gate, kind), n);
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
  const int64_t id = a.ids[row] - a.first;
  T* to = (T*)a.out + row * a.size;
  if (id < 0 || id >= a.count) {
    memset(to, 0, a.size * sizeof(T));
    return;
  }
  const T* from = (const T*)a.table + (a.units ? id / BLOCK * a.units * BLOCK + id % BLOCK : 0) * PER_UNIT;
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
