// Norms and rotations of heads, for one instruction set; after vectors.inl.

template <class T>
static inline float inverse_rms(const T* x, int64_t size, float eps) {
  Floats squares = {};
  FOR_LANES(i, n, size) {
    const Floats v = get(x + i, n);
    squares = squares + v * v;
  }
  return 1.0f / sqrtf(sum(squares) / size + eps);
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
