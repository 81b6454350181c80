// Scratch memory for the CPU kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "common/integers.h"

namespace fastvit {

// Rounded up to whole cache lines.
FASTVIT_INLINE int64_t whole_lines(int64_t floats) { return round_up(floats, 16); }

// Uninitialised memory of a thread, kept between calls so that its pages stay mapped.
class Workspace {
 public:
  float* take(int64_t floats);  // never null
  void give_back();             // frees the memory if it is too much to keep

  static Workspace& of_thread();  // for one thread of a parallel loop
  static Workspace& of_call();    // for memory that the threads of a call share

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* memory) const { operator delete(memory, kAlign); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace fastvit
