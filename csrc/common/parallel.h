// Parallel loops on torch's intra-op threads, without torch's headers.
#pragma once

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

// Multiply-adds below which waking another thread costs more than it saves.
inline constexpr int64_t kSerialProducts = 1 << 19;

// The grain of a loop over items of so many multiply-adds each.
FASTVIT_INLINE int64_t grain_of(int64_t products, int64_t serial_products = kSerialProducts) {
  return larger(1, serial_products / larger(1, products));
}

int num_threads();   // as torch.get_num_threads()
int thread_index();  // of the calling thread inside parallel_for, 0 outside

}  // namespace fastvit
