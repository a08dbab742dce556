// Processes of one machine exchange numbers through memory that they share. Plain C ABI.
//
// What the ranks of one line share is a region, all zero at first (parallel/shared_memory.py makes it):
//
//   poison | flags [rank] | written, read [from][to] | slots [2][rank][slot_bytes] | rings [from][to][ring_bytes]
//
// Sums and gathers go by rounds. A rank fills its slot, raises its flag to the round's number, and waits until all flags
// are as high; then it reads all slots. The next round has the other slots, and the one after that these again: whoever
// fills them has seen all flags of the round between, and so nobody reads them any more. One wait a round is enough.
// Everything else goes by rings of bytes, one for each pair of ranks.
//
// Who waits does not wait for ever: a poisoned region fails all operations, and a wait that takes too long poisons it.

#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elementwise.h"
#include "exchange.h"

namespace {

constexpr int64_t LINE_BYTES = 64;  // of a cache; each counter has its own
constexpr int64_t PAGE_BYTES = 4096;
constexpr int64_t PART_BYTES = 1 << 18;  // of a ring, after which the other rank may begin to read
constexpr int64_t BLOCK = 8192;          // elements that one thread adds up
constexpr int MOST_RANKS = 64;           // of a line, as in parallel/shared_memory.py
constexpr int NUM_PAUSES = 20, NUM_YIELDS = 3000, SLEEP_NS = 50000;

// Arguments as calls.py lays them out.
struct AllReduce {
  int32_t isa, threads, type, rank, size;
  char* region;
  int64_t slot_bytes, ring_bytes, timeout_ns;
  const void* x;
  void* out;                  // of the sums, those from begin to end
  int64_t count, begin, end;  // elements
};

struct Exchange {
  int32_t rank, size;
  char* region;
  int64_t slot_bytes, ring_bytes, timeout_ns;
  const char* x;  // what goes to each rank, one after the other
  char* out;      // what comes from each
  const int64_t *send, *receive;  // [size] bytes
};

enum Type : int32_t { BF16 = 0, FP16 = 1, FP32 = 2, INT32 = 3, INT64 = 4 };

typedef std::atomic<uint64_t> Counter;
static_assert(Counter::is_always_lock_free && sizeof(Counter) == 8, "shared between processes");

int64_t slots_at(int64_t size) {
  const int64_t counters = (1 + size + 2 * size * size) * LINE_BYTES;
  return (counters + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

struct Region {
  char* start;
  int64_t rank, size, slot_bytes, ring_bytes, timeout_ns;

  template <class Args>
  explicit Region(const Args& a)
      : start(a.region), rank(a.rank), size(a.size), slot_bytes(a.slot_bytes), ring_bytes(a.ring_bytes),
        timeout_ns(a.timeout_ns) {}

  Counter& counter(int64_t i) const { return *(Counter*)(start + i * LINE_BYTES); }
  Counter& poison() const { return counter(0); }
  Counter& flag(int64_t r) const { return counter(1 + r); }
  Counter& written(int64_t from, int64_t to) const { return counter(1 + size + 2 * (from * size + to)); }
  Counter& read(int64_t from, int64_t to) const { return counter(2 + size + 2 * (from * size + to)); }
  char* slots() const { return start + slots_at(size); }
  char* slot(uint64_t round, int64_t r) const { return slots() + ((round & 1) * size + r) * slot_bytes; }
  char* ring(int64_t from, int64_t to) const {
    return slots() + 2 * size * slot_bytes + (from * size + to) * ring_bytes;
  }
};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// Ever longer waits: the other rank runs on another core, or needs this one, or does something else altogether.
struct Patience {
  const Region& region;
  int64_t turns = 0, since_ns = 0;

  // Whether to look again; false once the region is poisoned.
  bool wait() {
    if (region.poison().load(std::memory_order_relaxed)) return false;
    if (++turns <= NUM_PAUSES) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else if (turns <= NUM_PAUSES + NUM_YIELDS) {
      sched_yield();
    } else {
      const int64_t now = now_ns();
      if (!since_ns) since_ns = now;
      if (now - since_ns > region.timeout_ns) region.poison().store(1, std::memory_order_relaxed);
      const timespec nap = {0, SLEEP_NS};
      nanosleep(&nap, nullptr);
    }
    return true;
  }
};

bool is_poisoned(const Region& region) { return region.poison().load(std::memory_order_relaxed) != 0; }

// Everybody's slots of this round are filled, this rank's among them.
bool publish(const Region& region, uint64_t round) {
  region.flag(region.rank).store(round, std::memory_order_release);
  for (int64_t r = 0; r < region.size; r++) {
    Patience patience{region};
    while (region.flag(r).load(std::memory_order_acquire) < round) {
      if (!patience.wait()) return false;
    }
  }
  return true;
}

uint64_t next_round(const Region& region) {
  return region.flag(region.rank).load(std::memory_order_relaxed) + 1;
}

#define QUIRE_OWN_WIDTH
#define QUIRE_KERNELS "exchange.inl"
#include "isa.h"

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Bytes from..to of everybody's x, taken from its slot, to their places in the result.
void place(const AllGather& a, const Region& region, uint64_t round, int64_t from, int64_t to) {
  for (int64_t r = 0; r < a.size; r++) {
    const char* slot = region.slot(round, r);
    for (int64_t i = from, n; i < to; i += n) {
      n = smaller(to - i, a.run - i % a.run);
      memcpy(a.out + (i / a.run * a.size + r) * a.run + i % a.run, slot + i - from, n);
    }
  }
}

// Part of what goes to (or comes from) another rank; whether there was any, and room for it.
bool put_some(const Region& region, int64_t to, const char*& data, int64_t& left) {
  Counter &written = region.written(region.rank, to), &read = region.read(region.rank, to);
  const uint64_t position = written.load(std::memory_order_relaxed);
  const int64_t at = position % region.ring_bytes, used = position - read.load(std::memory_order_acquire);
  const int64_t n = smaller(smaller(left, PART_BYTES), smaller(region.ring_bytes - used, region.ring_bytes - at));
  if (!n) return false;
  memcpy(region.ring(region.rank, to) + at, data, n);
  written.store(position + n, std::memory_order_release);
  data += n, left -= n;
  return true;
}

bool take_some(const Region& region, int64_t from, char*& data, int64_t& left) {
  Counter &written = region.written(from, region.rank), &read = region.read(from, region.rank);
  const uint64_t position = read.load(std::memory_order_relaxed);
  const int64_t at = position % region.ring_bytes, ready = written.load(std::memory_order_acquire) - position;
  const int64_t n = smaller(smaller(left, PART_BYTES), smaller(ready, region.ring_bytes - at));
  if (!n) return false;
  memcpy(data, region.ring(from, region.rank) + at, n);
  read.store(position + n, std::memory_order_release);
  data += n, left -= n;
  return true;
}

}  // namespace

extern "C" int64_t quire_region_bytes(int64_t size, int64_t slot_bytes, int64_t ring_bytes) {
  return slots_at(size) + size * (2 * slot_bytes + size * ring_bytes);
}

// All others take the address of their arguments, so that calls can be kept and made again (quire_replay). What they compute
// after the region was poisoned means nothing.

extern "C" void quire_all_reduce(const void* args) {
  const AllReduce& a = *(const AllReduce*)args;
  const Region region(a);
  const int64_t item = a.type == INT64 ? 8 : a.type == BF16 || a.type == FP16 ? 2 : 4;
  const int64_t most = a.slot_bytes / item;
  for (int64_t start = 0; (start < a.count || !a.count) && !is_poisoned(region); start += most) {
    const int64_t end = smaller(start + most, a.count), begin = larger(start, a.begin);
    const uint64_t round = next_round(region);
    memcpy(region.slot(round, a.rank), (const char*)a.x + start * item, (end - start) * item);
    if (!publish(region, round) || !a.count) return;
    const int64_t last = smaller(end, a.end);
    if (last <= begin) continue;
    if (last - begin < PARALLEL_ELEMENTS) {  // OpenMP takes a microsecond to find that one thread will do
      QUIRE_CALL(a.isa, add_slots(a, region, round, start, begin, last));
      continue;
    }
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t i = begin; i < last; i += BLOCK) {
      QUIRE_CALL(a.isa, add_slots(a, region, round, start, i, smaller(i + BLOCK, last)));
    }
  }
}

extern "C" void quire_all_gather(const void* args) {
  const AllGather& a = *(const AllGather*)args;
  const Region region(a);
  for (int64_t from = 0; from < a.bytes && !is_poisoned(region); from += a.slot_bytes) {
    const int64_t to = smaller(from + a.slot_bytes, a.bytes);
    const uint64_t round = next_round(region);
    memcpy(region.slot(round, a.rank), a.x + from, to - from);
    if (!publish(region, round)) return;
    place(a, region, round, from, to);
  }
}

extern "C" void quire_exchange(const void* args) {
  const Exchange& a = *(const Exchange*)args;
  const Region region(a);
  const char* from[MOST_RANKS] = {};
  char* to[MOST_RANKS] = {};
  int64_t sending[MOST_RANKS] = {}, receiving[MOST_RANKS] = {}, left = 0;
  const char* x = a.x;
  char* out = a.out;
  for (int64_t r = 0; r < a.size; r++) {
    from[r] = x, to[r] = out, sending[r] = a.send[r], receiving[r] = a.receive[r];
    x += a.send[r], out += a.receive[r];
    if (r == a.rank) continue;
    left += sending[r] + receiving[r];
  }
  if (a.send[a.rank]) memcpy(to[a.rank], from[a.rank], a.send[a.rank]);
  while (left) {
    Patience patience{region};
    bool moved = false;
    while (!moved) {
      left = 0;
      for (int64_t r = 0; r < a.size; r++) {
        if (r == a.rank) continue;
        moved |= sending[r] && put_some(region, r, from[r], sending[r]);
        moved |= receiving[r] && take_some(region, r, to[r], receiving[r]);
        left += sending[r] + receiving[r];
      }
      if (!moved && !patience.wait()) return;
    }
  }
}
