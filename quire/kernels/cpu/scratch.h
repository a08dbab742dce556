// Memory of a thread that calls, kept for its next call.
#pragma once
#include <cstdint>
#include <cstdlib>

struct Scratch {
  char* memory = nullptr;
  int64_t size = 0;
  ~Scratch() { free(memory); }
  char* of(int64_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + 63) / 64 * 64;
      memory = (char*)aligned_alloc(64, size);
      if (!memory) abort();  // as C++'s own allocation would
    }
    return memory;
  }
};
