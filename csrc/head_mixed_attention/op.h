// Dividing the work of kernels whose results are sums over all queries of a batch element.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "attention/op.h"
#include "head_mixed_attention/args.h"

namespace fastvit {

// Runs the kernel over all queries of all batch elements; keys(b) are the keys of one. Returns the totals. Results
// depend on the number of threads, but not on their timing.
template <class Params, class Keys>
std::vector<double> run_head_maps(const Params& p, const HeadMapKernel<Params>& kernel, int64_t products_per_query,
                                  const Keys& keys) {
  if (p.heads == 0) return {};
  const int64_t packed_floats = whole_lines(kernel.packed_floats), scratch_floats = whole_lines(kernel.scratch_floats);
  const int64_t count = HeadMapTotals{p.heads}.count();
  const int64_t units = divide_up(p.queries, kernel.lanes);
  const int64_t products = std::max<int64_t>(1, products_per_query * p.queries);

  // Whole batch elements if that keeps the threads equally busy, otherwise parts of them.
  const int64_t threads = std::max(1, num_threads());
  const bool serial = p.batch * products <= kSerialProducts;
  const int64_t even = threads / std::gcd(p.batch, threads);
  const int64_t parts = serial || p.batch >= 4 * threads ? 1 : std::max<int64_t>(1, std::min(even, units));
  const int64_t tasks = p.batch * parts;
  const int64_t grain = std::max<int64_t>(1, kSerialProducts * parts / products);

  std::vector<double> totals(static_cast<size_t>(tasks * count), 0.0);
  const bool shared = parts > 1 && kernel.finish != nullptr;
  float* shared_sums = shared ? Workspace::of_call().take(tasks * kernel.sum_floats) : nullptr;
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const int64_t own_sums = shared ? 0 : kernel.sum_floats;
    float* scratch = Workspace::of_thread().take(scratch_floats + packed_floats + own_sums + 16);
    float* packed = scratch + scratch_floats;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, part = task % parts;
      float* sums = shared ? shared_sums + task * kernel.sum_floats : packed + packed_floats;
      std::memset(sums, 0, static_cast<size_t>(kernel.sum_floats) * sizeof(float));
      if (part == 0 || task == begin) kernel.pack(p, b, keys(b), packed);
      kernel.run(p, b, part * units / parts * kernel.lanes,
                 std::min(p.queries, (part + 1) * units / parts * kernel.lanes), keys(b), packed, scratch, sums,
                 totals.data() + task * count);
      for (int64_t h = 0; h < p.heads && !shared && kernel.finish != nullptr; ++h) {
        kernel.finish(p, b, h, keys(b), sums, 1);
      }
    }
    Workspace::of_thread().give_back();
  });
  if (shared) {
    parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.heads;
        kernel.finish(p, b, i % p.heads, keys(b), shared_sums + b * parts * kernel.sum_floats, parts);
      }
    });
  }
  Workspace::of_call().give_back();
  for (int64_t i = count; i < tasks * count; ++i)
    totals[static_cast<size_t>(i % count)] += totals[static_cast<size_t>(i)];
  totals.resize(static_cast<size_t>(count));
  return totals;
}

}  // namespace fastvit
