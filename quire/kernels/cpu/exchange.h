// How other kernels exchange numbers with those of other processes; see exchange.cpp.
#pragma once

#include <cstdint>

// Arguments as calls.py lays them out.
struct AllGather {
  int32_t rank, size;
  char* region;
  int64_t slot_bytes, ring_bytes, timeout_ns;
  const char* x;
  char* out;            // [bytes / run][size][run]
  int64_t bytes, run;
};

extern "C" void quire_all_gather(const void* args);
