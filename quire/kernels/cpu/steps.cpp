// What surrounds the network in a step of newest tokens on a CPU: runner/advance.py says what it is. Plain C ABI.

#include <cstdint>
#include <cstring>

namespace {

constexpr int32_t ENDED = -1;  // as in advance.py

struct Gather {
  const int64_t* rows;     // [count] slots
  const int32_t *numbers;  // [nobody + 1][numbers_stride]: number of tokens, then blocks
  const int32_t* tokens;   // [nobody + 1][tokens_stride]
  int64_t *token_ids, *positions, *following, *places;
  int32_t *query_starts, *lengths, *tables;
  int64_t count, nobody, numbers_stride, tokens_stride, tables_stride, block_size;
};

struct Advance {
  const int64_t* rows;
  int32_t *numbers, *tokens;  // as above
  const int64_t *stops, *stops_from;  // [nobody + 1] addresses of a count and as many tokens, or 0; first positions
  const int64_t *following, *token_ids;
  const bool* bad;
  const int32_t* scores;  // [num_scores] or null
  int32_t* entries;       // [num_entries][width]
  int64_t* num_steps;
  int64_t count, nobody, numbers_stride, tokens_stride, num_scores, num_entries, width;
};

struct Pick {
  void* out;          // [num_rows][count]
  const void* table;  // [num_rows][stride]
  const int64_t* columns;
  int64_t num_rows, count, stride, itemsize;
};

struct Elsewhere {
  const int32_t* tables;  // [count][tables_stride]
  const int64_t* slots;   // [num_slots]
  const int32_t *lengths, *beside;  // [count]; [num_blocks] or null
  int32_t* new_tables;              // [count][width]
  int64_t* new_slots;
  int32_t* new_lengths;  // if there are chunks
  int64_t count, width, tables_stride, num_slots, block_size, chunk;
};

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};

bool ends(const Advance& a, int64_t slot, int64_t token, int64_t position) {
  const int32_t* record = (const int32_t*)a.stops[slot];
  if (!record || position < a.stops_from[slot]) return false;
  for (int32_t i = 1; i <= record[0]; i++)
    if (record[i] == token) return true;
  return false;
}

}  // namespace

extern "C" void quire_gather(const void* args) {
  const Gather& a = *(const Gather*)args;
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t slot = a.rows[i];
    const int32_t* numbers = a.numbers + slot * a.numbers_stride;
    const bool present = slot < a.nobody;
    const int64_t length = present ? (numbers[0] < 0 ? -numbers[0] : numbers[0]) : 0;
    const int64_t position = length > 0 ? length - 1 : 0, block = numbers[1 + position / a.block_size];
    a.token_ids[i] = a.tokens[slot * a.tokens_stride + position];
    a.positions[i] = position;
    a.following[i] = position + 1;
    a.places[i] = present && numbers[0] > 0 ? block * a.block_size + position % a.block_size : -1;
    a.query_starts[i + 1] = a.query_starts[i] + present;
    a.lengths[i] = (int32_t)length;
    const int64_t blocks = (length + a.block_size - 1) / a.block_size;
    memcpy(a.tables + i * a.tables_stride, numbers + 1, blocks * sizeof(int32_t));
  }
}

extern "C" void quire_advance(const void* args) {
  const Advance& a = *(const Advance*)args;
  int32_t* entry = a.entries + *a.num_steps % a.num_entries * a.width;
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t slot = a.rows[i], at = a.following[i], token = a.token_ids[i];
    int32_t& length = a.numbers[slot * a.numbers_stride];
    const bool alive = slot < a.nobody && length > 0;
    if (alive) {
      a.tokens[slot * a.tokens_stride + at] = (int32_t)token;
      length = (int32_t)(ends(a, slot, token, at) ? -at - 1 : at + 1);
    }
    entry[i] = alive || slot == a.nobody ? (int32_t)token : ENDED;
    entry[a.count + i] = a.bad[i];
  }
  if (a.scores) memcpy(entry + 2 * a.count, a.scores, a.num_scores * sizeof(int32_t));
  ++*a.num_steps;
}

extern "C" void quire_pick(const void* args) {
  const Pick& a = *(const Pick*)args;
  for (int64_t r = 0; r < a.num_rows; r++)
    for (int64_t i = 0; i < a.count; i++)
      memcpy((char*)a.out + (r * a.count + i) * a.itemsize,
             (const char*)a.table + (r * a.stride + a.columns[i]) * a.itemsize, a.itemsize);
}

extern "C" void quire_copy(const void* args) {
  const Copy& a = *(const Copy*)args;
  memcpy(a.to, a.from, a.bytes);
}

extern "C" void quire_elsewhere(const void* args) {
  const Elsewhere& a = *(const Elsewhere*)args;
  auto moved = [&](int64_t block) { return a.beside ? a.beside[block] : block; };
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t length = a.lengths[i], begin = a.chunk && length ? (length - 1) / a.chunk * a.chunk : 0;
    const int64_t first = begin / a.block_size, last = (length + a.block_size - 1) / a.block_size;
    const int32_t* from = a.tables + i * a.tables_stride;
    for (int64_t j = first; j < last; j++) a.new_tables[i * a.width + j - first] = moved(from[j]);
    for (int64_t j = last - first; j < a.width; j++) a.new_tables[i * a.width + j] = 0;
    if (a.chunk) a.new_lengths[i] = length - begin;
  }
  for (int64_t i = 0; i < a.num_slots; i++) {
    const int64_t slot = a.slots[i];
    a.new_slots[i] = slot < 0 ? slot : moved(slot / a.block_size) * a.block_size + slot % a.block_size;
  }
}
