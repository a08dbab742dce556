// Draws one token per row of logits of which each rank of a line has those of its own tokens, as sampling.cpp draws it from
// all of them. Ranks tell each other little: the greatest logit of each row, if it has filters; the likeliest tokens' of a
// row that has a top_k or top_p; and the token that they would draw. A row of which its threshold cannot be told by that is
// gathered whole.

#include "draw.h"
#include "exchange.h"

namespace {

constexpr int64_t LOOK = 256;  // tokens of a rank: what most thresholds follow from
constexpr int64_t SPARE = 16;   // beyond top_k, so that it does not look as if there were more equal to the last

// Arguments as calls.py lays them out.
struct DrawTogether {
  int32_t rank, size;
  char* region;
  int64_t slot_bytes, ring_bytes, timeout_ns;
  Draw own;                     // its top_k counts all tokens
  int64_t first, share, whole;  // the rank's first token; how many a rank has, the last one fewer; all
};

// A row's tokens of this rank.
struct Part {
  Row row;
  std::vector<float> maxima;
  float own_greatest, greatest;  // NaN if there is one; the latter is everybody's once they are known
  float floor = -INF;            // the least scaled logit that may be drawn
};

// What a rank says of a row.
struct Look {
  double mass;  // of what min_p keeps; 0 if there is a top_k
  float limit;  // -INF if `values` are all that matter, else their least
  int32_t count;
  float values[LOOK];
};

struct Offer {
  float greatest, score;
  int64_t token;
};

template <class T>
std::vector<T> gather(const DrawTogether& a, const std::vector<T>& mine) {
  std::vector<T> all(mine.size() * a.size);
  const int64_t bytes = static_cast<int64_t>(mine.size() * sizeof(T));
  const AllGather args{a.rank,       a.size, a.region, a.slot_bytes, a.ring_bytes, a.timeout_ns, (const char*)mine.data(),
                       (char*)all.data(), bytes,  bytes};
  quire_all_gather(&args);
  return all;
}

template <class Function>
void for_rows(const DrawTogether& a, int64_t count, Function function) {
#pragma omp parallel for num_threads(a.own.threads) schedule(dynamic) if (count > 1 && a.own.threads > 1)
  for (int64_t i = 0; i < count; ++i) function(i);
}

float larger_or_nan(float x, float y) { return x > y || x != x ? x : y; }

float block_greatest(const Row& row, std::vector<float>& maxima) {
  maxima.resize((row.vocab_size + BLOCK - 1) / BLOCK);
  if (!block_maxima(row.logits, row.vocab_size, maxima.data())) return std::numeric_limits<float>::quiet_NaN();
  return *std::max_element(maxima.begin(), maxima.end());
}

float lowest(const Part& part) {
  return std::max(part.floor, part.greatest * part.row.scale - NOISE_SPAN);
}

void look(const DrawTogether& a, const Part& part, Look& look) {
  static thread_local Candidates found;
  const Row& row = part.row;
  const float top = part.greatest * row.scale;
  float cut = lowest(part);
  bool all = true;
  const bool has_top_k = row.top_k < a.whole;
  const int64_t most = has_top_k ? std::min(row.top_k + SPARE, LOOK) : LOOK;
  look.mass = has_top_k ? 0 : sum_mass(row.logits, row.vocab_size, row.scale, top, part.floor).all;
  if (most <= static_cast<int64_t>(part.maxima.size())) {  // so many blocks have a token this great
    std::vector<float> ordered = part.maxima;
    std::nth_element(ordered.begin(), ordered.begin() + (most - 1), ordered.end(), std::greater<float>());
    if (ordered[most - 1] * row.scale > cut) cut = ordered[most - 1] * row.scale, all = false;
  }
  collect(row, part.maxima, cut, found);
  std::vector<float>& values = found.values;
  if (values.size() > SORTABLE) {
    const float last = reach(values.data(), values.size(), {top, top, cut, false, 0}, static_cast<double>(most));
    all = all && last <= cut, cut = last;
  }
  values.erase(std::remove_if(values.begin(), values.end(), [&](float x) { return !(x >= cut); }), values.end());
  std::sort(values.begin(), values.end(), std::greater<float>());
  all = all && static_cast<int64_t>(values.size()) <= most;
  look.count = static_cast<int32_t>(std::min<int64_t>(most, values.size()));
  std::copy_n(values.begin(), look.count, look.values);
  look.limit = all || !look.count ? -INF : look.values[look.count - 1];
}

// Sets the row's floor by what rank r says in looks[r * stride]; false if that does not tell.
bool find_floor(const DrawTogether& a, Part& part, const Look* looks, int64_t stride) {
  const Row& row = part.row;
  const float top = part.greatest * row.scale;
  float cut = lowest(part), limit = -INF;
  double total = 0, sum = 0;
  std::vector<float> values;
  for (int32_t r = 0; r < a.size; ++r) {
    const Look& look = looks[r * stride];
    values.insert(values.end(), look.values, look.values + look.count);
    limit = std::max(limit, look.limit);
    total += look.mass;
  }
  std::sort(values.begin(), values.end(), std::greater<float>());
  const bool has_top_k = row.top_k < a.whole;
  if (has_top_k) {
    const bool enough = row.top_k <= static_cast<int64_t>(values.size()) && values[row.top_k - 1] >= limit;
    if (!enough && limit > -INF) return false;
    if (enough) cut = std::max(cut, values[row.top_k - 1]);
  }
  part.floor = cut;
  if (row.top_p >= 1.0f) return true;
  if (has_top_k) {
    if (cut <= limit) return false;  // there may be more of the last one
    total = sum_mass(values.data(), static_cast<int64_t>(values.size()), 1.0f, top, cut).all;
  }
  for (float x : values) {
    if (x < cut) break;
    sum += fast_exp(x - top);
    part.floor = x;
    if (sum >= row.top_p * total) return x >= limit;
  }
  part.floor = cut;
  return limit == -INF;
}

// Sets rows' floors by all tokens of all ranks.
void find_floors_of_all(const DrawTogether& a, const std::vector<Part*>& parts) {
  std::vector<std::vector<float>> rows;
  for (const Part* part : parts) {
    std::vector<float> mine(a.share, -INF);
    std::copy_n(part->row.logits, part->row.vocab_size, mine.begin());
    rows.push_back(gather(a, mine));
  }
  for_rows(a, static_cast<int64_t>(parts.size()), [&](int64_t i) {
    static thread_local Candidates found;
    Row row = parts[i]->row;
    row.logits = rows[i].data(), row.vocab_size = a.whole;
    std::vector<float> maxima;
    const float greatest = block_greatest(row, maxima);
    if (std::isfinite(greatest)) parts[i]->floor = survivors(row, maxima, greatest * row.scale, found);
  });
}

void find_floors(const DrawTogether& a, std::vector<Part>& parts) {
  const int64_t rows = a.own.num_rows;
  std::vector<float> greatest;
  for (const Part& part : parts) greatest.push_back(part.own_greatest);
  greatest = gather(a, greatest);
  std::vector<Part*> asked;
  for (int64_t i = 0; i < rows; ++i) {
    Part& part = parts[i];
    for (int32_t r = 0; r < a.size; ++r) part.greatest = larger_or_nan(greatest[r * rows + i], part.greatest);
    if (part.row.scale == 0 || !std::isfinite(part.greatest)) continue;
    part.floor = part.greatest * part.row.scale + part.row.log_min_p;
    if (part.row.top_k < a.whole || part.row.top_p < 1.0f) asked.push_back(&part);
  }
  const int64_t count = static_cast<int64_t>(asked.size());
  if (!count) return;
  std::vector<Look> looks(count);
  for_rows(a, count, [&](int64_t i) { look(a, *asked[i], looks[i]); });
  looks = gather(a, looks);
  std::vector<char> known(count);
  for_rows(a, count, [&](int64_t i) { known[i] = find_floor(a, *asked[i], &looks[i], count); });
  std::vector<Part*> unknown;
  for (int64_t i = 0; i < count; ++i)
    if (!known[i]) unknown.push_back(asked[i]);
  find_floors_of_all(a, unknown);
}

Offer offer(const Part& part) {
  static thread_local Candidates found;
  const Row& row = part.row;
  if (!std::isfinite(part.greatest)) return {part.own_greatest, -INF, 0};
  if (row.scale == 0) {
    const float* end = row.logits + row.vocab_size;
    return {part.own_greatest, part.own_greatest, row.first + (std::find(row.logits, end, part.own_greatest) - row.logits)};
  }
  const float floor = lowest(part);
  collect(row, part.maxima, floor, found);
  const Best best = draw_among(row, found, floor);
  return {part.own_greatest, best.score, best.token};
}

}  // namespace

// All ranks call this with the same rows, and get the same tokens.
extern "C" void quire_draw_together(const void* args) {
  const DrawTogether& a = *static_cast<const DrawTogether*>(args);
  const int64_t rows = a.own.num_rows;
  std::vector<Part> parts(rows);
  for_rows(a, rows, [&](int64_t i) {
    Part& part = parts[i];
    part.row = a.own.row(i);
    part.row.first = a.first;
    part.own_greatest = part.greatest = block_greatest(part.row, part.maxima);
  });
  bool filters = false;
  for (const Part& p : parts)
    filters |= p.row.scale > 0 && (p.row.top_k < a.whole || p.row.top_p < 1.0f || p.row.log_min_p > -INF);
  if (filters) find_floors(a, parts);
  std::vector<Offer> offers(rows);
  for_rows(a, rows, [&](int64_t i) { offers[i] = offer(parts[i]); });
  offers = gather(a, offers);
  for (int64_t i = 0; i < rows; ++i) {
    float greatest = -INF;
    Best best;
    for (int32_t r = 0; r < a.size; ++r) {
      const Offer& other = offers[r * rows + i];
      greatest = larger_or_nan(other.greatest, greatest);
      best.offer(other.score, other.token);
    }
    a.own.bad[i] = !std::isfinite(greatest);
    a.own.tokens[i] = a.own.bad[i] ? 0 : best.token;
  }
}
