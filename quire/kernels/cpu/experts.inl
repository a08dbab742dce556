// What sparse experts need besides products, for one instruction set. See experts.cpp.

#include "vectors.inl"

// a wins against b: greater, or no number, as PyTorch's topk has it.
static inline bool beats(float a, float b) { return a > b || (a != a && b == b); }

// The indices of the `most` greatest of `count` numbers, the greatest first, and of equal ones the first.
static inline void best_of(const float* x, int64_t count, int64_t most, int32_t* best) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    if (found == most && !beats(x[i], x[best[most - 1]])) continue;
    int64_t at = found < most ? found++ : most - 1;
    for (; at > 0 && beats(x[i], x[best[at - 1]]); at--) best[at] = best[at - 1];
    best[at] = i;
  }
}

static inline void softmax(float* x, int64_t count) {
  Floats most = fill(-INFINITY), total{};
  FOR_LANES(i, n, count) {
    Floats some = get(x + i, n);
    for (int64_t lane = n; lane < LANES; lane++) some[lane] = -INFINITY;
    most = larger(most, some);
  }
  const float top = largest(most);
  FOR_LANES(i, n, count) {
    Floats some = exp(get(x + i, n) - top);
    for (int64_t lane = n; lane < LANES; lane++) some[lane] = 0;
    total += some;
    put(x + i, some, n);
  }
  const float all = sum(total);
  FOR_LANES(i, n, count) { put(x + i, get(x + i, n) / all, n); }
}

// Rules out all experts but those of the best groups; a group is as good as its best expert, or its two best together.
static inline void keep_best_groups(const Route& a, float* choice, float* values, int32_t* best) {
  const int64_t size = a.num_experts / a.groups, some = a.correction && size > 1 ? 2 : 1;
  for (int64_t group = 0; group < a.groups; group++) {
    const float* members = choice + group * size;
    best_of(members, size, some, best);
    values[group] = members[best[0]] + (some == 2 ? members[best[1]] : 0.0f);
  }
  best_of(values, a.groups, a.top_groups, best);
  for (int64_t group = 0; group < a.groups; group++) {
    bool kept = false;
    for (int64_t i = 0; i < a.top_groups; i++) kept = kept || best[i] == group;
    for (int64_t e = group * size; !kept && e < (group + 1) * size; e++) choice[e] = -INFINITY;
  }
}

// `memory` has room for four numbers per expert.
static inline void route(const Route& a, int64_t row, float* memory) {
  const int64_t count = a.num_experts;
  float *scores = memory, *choice = memory + count, *values = memory + 2 * count;
  int32_t *best = (int32_t*)(memory + 3 * count), *experts = a.experts + row * a.top_k;
  float* weights = a.weights + row * a.top_k;
  memcpy(scores, a.logits + row * a.stride, count * 4);
  if (a.score == SOFTMAX) softmax(scores, count);
  FOR_LANES(i, n, count) {
    Floats score = get(scores + i, n);
    if (a.score == SIGMOIDS) put(scores + i, score = sigmoid(score), n);
    put(choice + i, a.correction ? score + get(a.correction + i, n) : score, n);
  }
  if (a.groups > 1) keep_best_groups(a, choice, values, best);
  best_of(choice, count, a.top_k, experts);
  for (int64_t i = 0; i < a.top_k; i++) weights[i] = scores[experts[i]];
  if (a.score == SOFTMAX_CHOSEN) softmax(weights, a.top_k);
  float all = 0;
  for (int64_t i = 0; i < a.top_k; i++) all += weights[i];
  if (a.score == SOFTMAX_CHOSEN || !a.renorm) all = 1;
  for (int64_t i = 0; i < a.top_k; i++) weights[i] = weights[i] / all * a.scale;
}

// As a number of the type would be read again.
template <class T>
static inline Floats rounded(Floats x);
template <>
inline Floats rounded<float>(Floats x) {
  return x;
}
template <>
inline Floats rounded<Bf16>(Floats x) {
  return (Floats)(as_words(to_bf16(x)) << 16);
}

// Adds what a token's pairs within the piece have become; at the last piece, what the shared expert made of it.
template <class T>
static inline void add_pairs_of(const Sums& a, int64_t token) {
  const int32_t* places = a.places + token * a.top_k;
  const T* shared = a.shared ? (const T*)a.shared + token * a.shared_stride : nullptr;
  const Floats gate = a.gate ? rounded<T>(sigmoid(load_some((const T*)a.gate + token, 1))) : Floats{};
  FOR_LANES(i, n, a.dim) {
    Floats total = a.first ? get(a.totals + token * a.dim + i, n) : Floats{};
    for (int64_t k = 0; k < a.top_k; k++) {
      const int64_t row = places[k] - a.first;
      if (row >= 0 && row < a.count) total = total + get((const T*)a.parts + row * a.dim + i, n) * a.weights[places[k]];
    }
    if (!a.last) {
      put(a.totals + token * a.dim + i, total, n);
      continue;
    }
    if (shared) {
      Floats more = get(shared + i, n);
      if (a.gate) more = rounded<T>(more * gate[0]);
      total = rounded<T>(total) + more;
    }
    put((T*)a.out + token * a.dim + i, total, n);
  }
}

static inline void add_pairs(const Sums& a, int64_t token) {
  if (a.is_bf16) {
    add_pairs_of<Bf16>(a, token);
  } else {
    add_pairs_of<float>(a, token);
  }
}
