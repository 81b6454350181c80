// Parallel loops on torch's intra-op threads, without torch's headers.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/integers.h"

namespace fastvit {

using RangeBody = void (*)(int64_t begin, int64_t end, const void* context);

// Runs body over [begin, end) in chunks of at least `grain` on torch's threads. The first exception thrown by a chunk
// is rethrown here once every chunk has ended.
void parallel_for_range(int64_t begin, int64_t end, int64_t grain, RangeBody body, const void* context);

// f(begin, end) over chunks of [begin, end).
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_for_range(
      begin, end, grain,
      [](int64_t chunk_begin, int64_t chunk_end, const void* context) {
        (*static_cast<const F*>(context))(chunk_begin, chunk_end);
      },
      &f);
}

// Dynamic scheduling: the threads take items [0, items) one by one, since a core may be slower than another, or share
// its units with another program. `start` is called on each thread and gives the function of an item.
template <class F>
void parallel_dynamic(int64_t items, int64_t threads, const F& start) {
  std::atomic<int64_t> next{0};
  parallel_for(0, smaller(items, threads), 1, [&](int64_t, int64_t) {
    auto work = start();
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item);
  });
}

// Multiply-adds below which waking another thread costs more than it saves.
inline constexpr int64_t kSerialProducts = 1 << 19;

// The grain of a loop over items of so many multiply-adds each.
FASTVIT_INLINE int64_t grain_of(int64_t products, int64_t serial_products = kSerialProducts) {
  return larger(1, serial_products / larger(1, products));
}

int num_threads();   // as torch.get_num_threads()
int thread_index();  // of the calling thread inside parallel_for, 0 outside

}  // namespace fastvit
