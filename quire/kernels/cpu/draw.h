// A row of logits, and how one of its tokens is drawn. Included by sampling.cpp and together.cpp, each of which compiles its
// own. NaN must stay NaN: never compile this with -ffast-math.
//
// Most of a row cannot win and is never given noise: noise spans [-2.82, 22.88], so a token that lies further than
// their distance below the greatest loses to it. The maxima of blocks say which parts of a row to look at.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

// One copy of a function per instruction set, chosen when the library is loaded. The ones that SELECT lanes may
// compute both sides of a choice, which GCC's default of exact floating-point traps would forbid.
#if defined(__GNUC__) && !defined(__clang__)
#if defined(__x86_64__)
#define CLONES target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"),
#else
#define CLONES
#endif
#define VECTORISED __attribute__((CLONES optimize("O3")))
#define SELECTING __attribute__((CLONES optimize("O3", "no-trapping-math")))
#else
#define VECTORISED
#define SELECTING
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOISE_MOST = 22.9f;  // noise is less than this,
constexpr float NOISE_SPAN = 26.0f;  // and any two differ by less than this
constexpr float NEARBY = 8.0f;       // most nuclei end within this distance of the greatest logit
constexpr int64_t BLOCK = 256;       // tokens; a multiple of GROUP
constexpr int GROUP = 4;             // tokens that share a Philox counter
constexpr int LANES = 16;            // counters computed at once
constexpr int BUCKETS = 1024;
constexpr size_t SORTABLE = 2048;  // fewer values are simply sorted
struct Row {
  const float* logits;
  int64_t vocab_size;
  float scale, log_min_p, top_p;
  int64_t top_k;
  uint64_t seed, position;
  int64_t first = 0;  // the row's first token
};

// Groups with a token worth a draw, and the scaled logits of their tokens; -inf where one is not.
struct Candidates {
  std::vector<uint32_t> groups;
  std::vector<float> values;
};

// Where to look for a threshold: values from `most` down to `least`, each weighing its probability or 1.
struct Range {
  float greatest, most, least;
  bool by_mass;
  float per_bucket;
};

// Sums of exp(value - greatest) over all values above a floor, and over those that are NEARBY.
struct Mass {
  double all = 0, near = 0;
};

struct Best {
  float score = -INF;
  int64_t token = 0;

  void offer(float other, int64_t index) {  // indices come in order: of equals the first stays
    if (other > score) {
      score = other;
      token = index;
    }
  }
};

INLINE float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE int32_t to_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// log(1 + f) by the series of 2 atanh(f / (2 + f)); |f| <= 0.42. The first term left out is below 2e-9 of it.
INLINE float log_near_one(float f) {
  float s = f / (2.0f + f), q = s * s;
  return 2.0f * s * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}

constexpr int32_t ROOT_HALF = 0x3f3504f3;  // the bits of sqrt(1/2)

// log of a positive normal number.
INLINE float fast_log(float x) {
  int32_t exponent = (to_bits(x) - ROOT_HALF) >> 23;
  float mantissa = from_bits(to_bits(x) - (exponent << 23));  // in [sqrt(1/2), sqrt(2))
  return static_cast<float>(exponent) * 0.693147181f + log_near_one(mantissa - 1.0f);
}

// log(1 - u) for u in (0, 1), as precise for small u as u itself.
INLINE float fast_log1m(float u) {
  float x = 1.0f - u;
  int32_t exponent = (to_bits(x) - ROOT_HALF) >> 23;
  float mantissa = from_bits(to_bits(x) - (exponent << 23));
  float f = exponent == 0 ? -u : mantissa - 1.0f;
  return static_cast<float>(exponent) * 0.693147181f + log_near_one(f);
}

// exp(x) for x <= 0; below -87 it stays at exp(-87), which is 0 next to exp(0).
INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: the sum's low bits are the rounded product
  float whole = shifted - 12582912.0f;
  float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float power = from_bits((static_cast<int32_t>(whole) + 127) << 23);
  float series = 1.0f + r * (1.0f / 7);
  series = 1.0f + r * (1.0f / 6) * series;
  series = 1.0f + r * (1.0f / 5) * series;
  series = 1.0f + r * (1.0f / 4) * series;
  series = 1.0f + r * (1.0f / 3) * series;
  series = 1.0f + r * (1.0f / 2) * series;
  return power * (1.0f + r * series);
}

// The greatest logit of every block. False if there is a NaN.
VECTORISED bool block_maxima(const float* logits, int64_t vocab_size, float* maxima) {
  int32_t wrong = 0;
  for (int64_t start = 0; start < vocab_size; start += BLOCK) {
    float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = -INF;
    int64_t end = std::min(start + BLOCK, vocab_size), at = start;
    for (; at + LANES <= end; at += LANES)
      for (int i = 0; i < LANES; ++i) {
        float x = logits[at + i];
        lanes[i] = x > lanes[i] ? x : lanes[i];
        wrong |= x != x;
      }
    for (; at < end; ++at) {
      lanes[0] = std::max(lanes[0], logits[at]);
      wrong |= logits[at] != logits[at];
    }
    maxima[start / BLOCK] = *std::max_element(lanes, lanes + LANES);
  }
  return wrong == 0;
}

// Adds a block to the mass. The lanes' float sums are short enough to keep six digits.
SELECTING void add_mass(const float* logits, int64_t size, float scale, float greatest, float floor, Mass& mass) {
  float all[LANES] = {}, near[LANES] = {};
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES)
    for (int i = 0; i < LANES; ++i) {
      float x = logits[at + i] * scale;
      float weight = x >= floor ? fast_exp(x - greatest) : 0.0f;
      all[i] += weight;
      near[i] += x >= greatest - NEARBY ? weight : 0.0f;
    }
  for (; at < size; ++at) {
    float x = logits[at] * scale;
    float weight = x >= floor ? fast_exp(x - greatest) : 0.0f;
    all[0] += weight;
    near[0] += x >= greatest - NEARBY ? weight : 0.0f;
  }
  for (int i = 0; i < LANES; ++i) {
    mass.all += all[i];
    mass.near += near[i];
  }
}

// out = logits * scale, or -inf where that is below `cut`; -inf up to a whole block.
SELECTING void scale_block(const float* logits, int64_t size, float scale, float cut, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    float x = logits[i] * scale;
    out[i] = x >= cut ? x : -INF;
  }
  for (int64_t i = size; i < BLOCK; ++i) out[i] = -INF;
}

void collect(const Row& row, const std::vector<float>& maxima, float cut, Candidates& found) {
  found.groups.clear();
  found.values.clear();
  float scaled[BLOCK];
  for (size_t block = 0; block < maxima.size(); ++block) {
    if (!(maxima[block] * row.scale >= cut)) continue;
    int64_t start = static_cast<int64_t>(block) * BLOCK;
    scale_block(row.logits + start, std::min(BLOCK, row.vocab_size - start), row.scale, cut, scaled);
    for (int i = 0; i < BLOCK; i += GROUP) {
      const float* v = scaled + i;
      if (std::max(std::max(v[0], v[1]), std::max(v[2], v[3])) == -INF) continue;
      found.groups.push_back(static_cast<uint32_t>((start + i) / GROUP));
      found.values.insert(found.values.end(), v, v + GROUP);
    }
  }
}

// The bucket of each value, counted down from range.most, and its weight; bucket BUCKETS for values out of range.
SELECTING void weigh_block(const float* values, int64_t size, const Range& range, int32_t* buckets,
                           float* weights) {
  const float least = range.least, most = range.most, per_bucket = range.per_bucket, greatest = range.greatest;
  const float every = range.by_mass ? 0.0f : 1.0f, by_mass = 1.0f - every;
  for (int64_t i = 0; i < size; ++i) {
    float x = values[i];
    float below = x >= least ? most - x : 0.0f;
    int32_t bucket = static_cast<int32_t>(below * per_bucket);
    bucket = bucket < BUCKETS - 1 ? bucket : BUCKETS - 1;
    buckets[i] = x >= least ? bucket : BUCKETS;
    weights[i] = every + by_mass * fast_exp(x - greatest);
  }
}

// The last of the fewest greatest values in the range whose weights reach `goal`; the range's least if none do.
float reach(const float* values, size_t size, Range range, double goal) {
  std::vector<float> inside;
  int32_t buckets[BLOCK];
  float weights[BLOCK];
  double before = 0;
  for (;;) {  // each round keeps one bucket, which the least and the greatest value never share
    range.per_bucket = BUCKETS / (range.most - range.least);
    if (size <= SORTABLE || !std::isfinite(range.per_bucket)) break;
    double sums[BUCKETS + 1] = {};
    for (size_t at = 0; at < size; at += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, size - at);
      weigh_block(values + at, count, range, buckets, weights);
      for (int64_t i = 0; i < count; ++i) sums[buckets[i]] += weights[i];
    }
    int last = 0;
    while (last < BUCKETS - 1 && before + sums[last] < goal) before += sums[last++];
    std::vector<float> next;
    for (size_t at = 0; at < size; at += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, size - at);
      weigh_block(values + at, count, range, buckets, weights);
      for (int64_t i = 0; i < count; ++i)
        if (buckets[i] == last) next.push_back(values[at + i]);
    }
    if (next.empty()) return range.least;
    inside = std::move(next);
    values = inside.data();
    size = inside.size();
    range.least = *std::min_element(inside.begin(), inside.end());
    range.most = *std::max_element(inside.begin(), inside.end());
  }
  if (range.most == range.least) return range.least;
  std::vector<float> ordered;
  for (size_t i = 0; i < size; ++i)
    if (values[i] >= range.least) ordered.push_back(values[i]);
  std::sort(ordered.begin(), ordered.end(), std::greater<float>());
  for (float x : ordered) {
    before += range.by_mass ? fast_exp(x - range.greatest) : 1.0f;
    if (before >= goal) return x;
  }
  return range.least;
}

Mass sum_mass(const float* logits, int64_t size, float scale, float greatest, float floor) {
  Mass mass;
  for (int64_t at = 0; at < size; at += BLOCK)
    add_mass(logits + at, std::min(BLOCK, size - at), scale, greatest, floor, mass);
  return mass;
}

// Collects what may be drawn, and returns the least value that may.
float survivors(const Row& row, const std::vector<float>& maxima, float greatest, Candidates& found) {
  float floor = greatest + row.log_min_p;
  float cut = std::max(floor, greatest - NOISE_SPAN);
  bool has_top_k = row.top_k < row.vocab_size, has_top_p = row.top_p < 1.0f;
  double total = 0;
  if (has_top_k && row.top_k <= static_cast<int64_t>(maxima.size())) {
    std::vector<float> ordered = maxima;  // k blocks have a token this great, so the k-th greatest token is too
    std::nth_element(ordered.begin(), ordered.begin() + (row.top_k - 1), ordered.end(), std::greater<float>());
    cut = std::max(cut, ordered[row.top_k - 1] * row.scale);
  } else if (has_top_p && !has_top_k) {
    Mass mass = sum_mass(row.logits, row.vocab_size, row.scale, greatest, floor);
    total = mass.all;
    if (mass.near >= row.top_p * total) cut = std::max(cut, greatest - NEARBY);
  }
  collect(row, maxima, cut, found);
  const float* values = found.values.data();
  size_t size = found.values.size();
  if (has_top_k) cut = reach(values, size, {greatest, greatest, cut, false, 0}, static_cast<double>(row.top_k));
  if (!has_top_p) return cut;
  if (has_top_k) total = sum_mass(values, static_cast<int64_t>(size), 1.0f, greatest, cut).all;
  return reach(values, size, {greatest, greatest, cut, true, 0}, row.top_p * total);
}

// Apart from the low half, which compilers then turn into vector instructions better than the whole product.
INLINE uint32_t high_half(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

// Philox4x32-10 for LANES counters that differ in their first word. words[j][i]: word j of counter i.
INLINE void philox(const uint32_t* groups, uint64_t seed, uint64_t position, uint32_t words[GROUP][LANES]) {
  uint32_t *a = words[0], *b = words[1], *c = words[2], *d = words[3];
  for (int i = 0; i < LANES; ++i) {
    a[i] = groups[i];
    b[i] = static_cast<uint32_t>(position);
    c[i] = static_cast<uint32_t>(position >> 32);
    d[i] = 0;
  }
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < LANES; ++i) {
      uint32_t first = high_half(a[i], 0xD2511F53u), second = high_half(c[i], 0xCD9E8D57u);
      uint32_t first_low = a[i] * 0xD2511F53u, second_low = c[i] * 0xCD9E8D57u;
      a[i] = second ^ b[i] ^ low;
      b[i] = second_low;
      c[i] = first ^ d[i] ^ high;
      d[i] = first_low;
    }
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// Adds noise to the tokens of LANES groups, values[j][i] being token j of group i; returns the greatest sum.
SELECTING float add_noise(const uint32_t* groups, uint64_t seed, uint64_t position, float values[GROUP][LANES]) {
  uint32_t words[GROUP][LANES];
  float greatest[LANES];
  philox(groups, seed, position, words);
  for (int i = 0; i < LANES; ++i) greatest[i] = -INF;
  for (int j = 0; j < GROUP; ++j)
    for (int i = 0; i < LANES; ++i) {
      float u = static_cast<float>(words[j][i]) * 0x1p-32f + 0x1p-33f;
      u = u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f;
      float score = values[j][i] - fast_log(-fast_log1m(u));
      values[j][i] = score;
      greatest[i] = score > greatest[i] ? score : greatest[i];
    }
  float most = -INF;
  for (int i = 0; i < LANES; ++i) most = greatest[i] > most ? greatest[i] : most;
  return most;
}

void draw_lanes(const Row& row, const uint32_t* groups, int count, float values[GROUP][LANES], Best& best) {
  if (add_noise(groups, row.seed, row.position, values) <= best.score) return;
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < GROUP; ++j) best.offer(values[j][i], static_cast<int64_t>(groups[i]) * GROUP + j);
}

Best draw_among(const Row& row, const Candidates& found, float floor) {
  Best best;
  uint32_t groups[LANES] = {};
  float values[GROUP][LANES] = {};
  int count = 0;
  for (size_t at = 0; at < found.groups.size(); ++at) {
    const float* v = &found.values[at * GROUP];
    if (std::max(std::max(v[0], v[1]), std::max(v[2], v[3])) < std::max(floor, best.score - NOISE_MOST)) continue;
    groups[count] = found.groups[at] + static_cast<uint32_t>(row.first / GROUP);
    for (int j = 0; j < GROUP; ++j) values[j][count] = v[j] >= floor ? v[j] : -INF;
    if (++count == LANES) {
      draw_lanes(row, groups, count, values, best);
      count = 0;
    }
  }
  if (count) draw_lanes(row, groups, count, values, best);
  return best;
}

// Arguments as calls.py lays them out. Per row: scale (1 / temperature, 0 for greedy), log_min_p (-inf: off),
// top_p (1: off), top_k (vocab_size: off), seed, position.
struct Draw {
  const float* logits;
  int64_t num_rows, vocab_size, stride;
  const float *scale, *log_min_p, *top_p;
  const int64_t *top_k, *seeds, *positions;
  int64_t* tokens;
  bool* bad;
  int32_t threads;

  Row row(int64_t r) const {
    return {logits + r * stride, vocab_size, scale[r], log_min_p[r], top_p[r], top_k[r],
            static_cast<uint64_t>(seeds[r]), static_cast<uint64_t>(positions[r])};
  }
};

}  // namespace
