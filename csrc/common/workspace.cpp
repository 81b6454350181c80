#include "common/workspace.h"

#include "common/torch_abi.h"

namespace fastvit {
namespace {

// Floats of a thread's memory that stay allocated between calls. None with AddressSanitizer, which only then sees an
// access beyond what a call took.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kKeptFloats = 0;
#else
constexpr int64_t kKeptFloats = 8 << 20;
#endif

}  // namespace

float* Workspace::take(int64_t floats) {
  if (floats > size_ || memory_ == nullptr) {
    memory_.reset();
    size_ = 0;
    const int64_t bytes = checked_product("fastvit", {floats, static_cast<int64_t>(sizeof(float))});
    memory_.reset(static_cast<float*>(operator new(static_cast<size_t>(bytes), kAlign)));
    size_ = floats;
  }
  return memory_.get();
}

void Workspace::give_back() {
  if (size_ <= kKeptFloats) return;
  memory_.reset();
  size_ = 0;
}

Workspace& Workspace::of_thread() {
  thread_local Workspace workspace;
  return workspace;
}

Workspace& Workspace::of_call() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace fastvit
