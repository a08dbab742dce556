// Draws one token per row of logits: temperature, min_p, top_k, top_p and Gumbel-max, with the same random bits as
// quire/sampling/philox.py. Knows rows of numbers only.

#include "draw.h"

namespace {

constexpr int64_t WORD = 32;  // bits of a mask

// The row's token, or -1 if it has NaN, +inf, or nothing to draw.
int64_t draw_row(const Row& row) {
  static thread_local std::vector<float> maxima;  // scratch, kept: fresh pages would cost more than the work
  static thread_local Candidates found;
  maxima.resize((row.vocab_size + BLOCK - 1) / BLOCK);
  if (!block_maxima(row.logits, row.vocab_size, maxima.data())) return -1;
  size_t block = std::max_element(maxima.begin(), maxima.end()) - maxima.begin();
  float greatest = maxima[block];
  if (!std::isfinite(greatest)) return -1;
  if (row.scale == 0) {
    const float* start = row.logits + block * BLOCK;
    return std::find(start, row.logits + row.vocab_size, greatest) - row.logits;
  }
  float floor = survivors(row, maxima, greatest * row.scale, found);
  return draw_among(row, found, floor).token;
}

// Adds -inf to the logits of tokens first, first + 1, ... whose bit is 0: token t's is bit t % 32 of word t / 32.
SELECTING void exclude_row(float* logits, int64_t size, int64_t first, const uint32_t* words) {
  for (int64_t at = 0; at < size; at += WORD) {
    const int64_t count = std::min(WORD, size - at), bit = (first + at) % WORD;
    const uint32_t* word = words + (first + at) / WORD;
    const uint32_t above = bit + count > WORD ? word[1] << (WORD - bit) : 0, allowed = word[0] >> bit | above;
    if (allowed == ~0u) continue;
    for (int64_t i = 0; i < count; ++i) logits[at + i] += allowed >> i & 1 ? 0.0f : -INF;
  }
}

// Divides or multiplies the logits of tokens seen by the repetition penalty, then subtracts those for generated.
SELECTING void penalise_block(float* logits, const int32_t* seen, int64_t size, const float* strengths) {
  const float repetition = strengths[0], frequency = strengths[1], presence = strengths[2];
  int32_t any = 0;
  for (int64_t i = 0; i < size; ++i) any |= seen[i];
  if (!any) return;
  for (int64_t i = 0; i < size; ++i) {
    float x = logits[i], lowered = x / repetition, raised = x * repetition;
    int32_t count = seen[i] >> 1;
    float repeated = x > 0 ? lowered : raised;
    float penalty = frequency * static_cast<float>(count) + (count > 0 ? presence : 0.0f);
    logits[i] = (seen[i] > 0 ? repeated : x) - penalty;
  }
}

}  // namespace

struct Exclude {
  float* logits;
  int64_t num_rows, size, stride;
  const int64_t* addresses;
  int64_t first;
  int32_t threads;
};

struct Penalise {
  float* logits;
  int64_t stride, vocab_size;
  const int64_t* slots;
  int64_t num_rows;
  const int64_t* addresses;
  int32_t threads;
};

// Draws a token for each row. Rows share the threads; one row is done before a second thread would have helped.
// `bad` rows hold NaN or +inf, or nothing finite; their token is 0.
extern "C" void quire_draw(const void* args) {
  const Draw& a = *static_cast<const Draw*>(args);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic) if (a.num_rows > 1 && a.threads > 1)
  for (int64_t r = 0; r < a.num_rows; ++r) {
    int64_t token = draw_row(a.row(r));
    a.bad[r] = token < 0;
    a.tokens[r] = token < 0 ? 0 : token;
  }
}

// Excludes tokens from each row that has a mask at addresses[row]; the logits are of tokens `first` and those after it.
extern "C" void quire_exclude(const void* args) {
  const Exclude& a = *static_cast<const Exclude*>(args);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic) if (a.num_rows > 1 && a.threads > 1)
  for (int64_t i = 0; i < a.num_rows; ++i)
    if (const auto* words = reinterpret_cast<const uint32_t*>(a.addresses[i]))
      exclude_row(a.logits + i * a.stride, a.size, a.first, words);
}

// Penalises row i of the logits in place, if slots[i] has a record at addresses[slots[i]]: three floats (repetition,
// frequency, presence) and a count ((times generated) * 2 + (in the prompt)) for each token.
extern "C" void quire_penalise(const void* args) {
  const Penalise& a = *static_cast<const Penalise*>(args);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic) if (a.num_rows > 1 && a.threads > 1)
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const auto* record = reinterpret_cast<const int32_t*>(a.addresses[a.slots[i]]);
    if (record == nullptr) continue;
    float strengths[3];
    std::memcpy(strengths, record, sizeof strengths);
    const int32_t* seen = record + 3;
    for (int64_t at = 0; at < a.vocab_size; at += BLOCK)
      penalise_block(a.logits + i * a.stride + at, seen + at, std::min(BLOCK, a.vocab_size - at), strengths);
  }
}
