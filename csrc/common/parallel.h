// Parallel loops on torch's intra-op threads, without torch's headers.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

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

// Dynamic scheduling of `groups` items of work in each of `blocks` blocks: a thread begins with blocks of its own,
// whose data it keeps in its cache, and then helps with those of others, since a core may be slower than another, or
// share its units with another program. `start` is called on each thread and gives f(block, group).
template <class F>
void parallel_dynamic(int64_t blocks, int64_t groups, int64_t threads, const F& start) {
  std::vector<std::atomic<int64_t>> next(static_cast<size_t>(blocks));
  threads = smaller(blocks * groups, threads);
  parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    auto work = start();
    const int64_t first = thread * blocks / threads;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = (first + i) % blocks;
      std::atomic<int64_t>& next_group = next[static_cast<size_t>(block)];
      for (int64_t group; (group = next_group.fetch_add(1, std::memory_order_relaxed)) < groups;) work(block, group);
    }
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
