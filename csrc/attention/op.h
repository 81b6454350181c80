// What attention operators do around their kernels: checks, lists of keys, results, and dividing the work.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "attention/args.h"
#include "common/arguments.h"
#include "common/torch_abi.h"
#include "common/workspace.h"

namespace fastvit {

// The (B, H, N, D) tensor as kernels take it; throws unless it has that dtype and a contiguous last axis.
AttentionOperand attention_operand(const char* op, const Tensor& tensor, const char* name, Dtype dtype);

// The parameters of attention over these tensors, without output and mask; throws naming what is wrong.
AttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                 bool or_float16 = false);

// An uninitialised (B, H, tokens, D) in the memory layout of a contiguous (B, tokens, H, D).
Tensor empty_heads_last(const AttentionParams& p, int64_t tokens, const Tensor& like);

// The strides of a mask or bias (B or 1, H or 1, Nq or 1, Nk or 1), 0 where it broadcasts; throws if it does not fit.
std::array<int64_t, 4> broadcast_strides(const char* op, const Tensor& tensor, const char* name,
                                         const AttentionParams& p);

// The keys that each batch element attends to: all, or those that a mask over keys alone allows.
class KeyLists {
 public:
  KeyLists(int64_t batch, int64_t keys, const Tensor* mask);
  AttentionKeys of(int64_t b) const;

 private:
  std::vector<int32_t> indices_;
  std::vector<size_t> begins_;
};

// Applies the mask: to the lists if it is over keys alone, and otherwise to the parameters. Throws naming what is wrong
// with it.
KeyLists take_mask(const char* op, const OptionalTensor& mask, AttentionParams& p);

// Runs the kernel over all queries of all problems; keys(problem) are the keys of one.
template <class Params, class Keys>
void run_attention(const Params& p, const AttentionKernel<Params>& kernel, int64_t problems, int64_t products_per_query,
                   const Keys& keys) {
  const int64_t packed_floats = whole_lines(kernel.packed_floats), scratch_floats = whole_lines(kernel.scratch_floats);
  const int64_t units = divide_up(p.queries, kernel.lanes);
  const int64_t grain = grain_of(products_per_query * kernel.lanes);

  // Many threads that need the same keys and values share one packed copy; two are faster with a copy each, as they do
  // not wait for each other.
  const int64_t parts = num_threads();
  const bool shared = 2 * problems < parts && units > grain;
  float* packed_by_all = shared ? Workspace::of_call().take(problems * packed_floats) : nullptr;
  if (shared) {
    parallel_for(0, problems * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t problem = i / parts;
        kernel.pack(p, problem, keys(problem), i % parts, parts, packed_by_all + problem * packed_floats);
      }
    });
  }
  parallel_for(0, problems * units, grain, [&](int64_t begin, int64_t end) {
    float* scratch = Workspace::of_thread().take(scratch_floats + (shared ? 0 : packed_floats) + 16);
    float* packed_here = scratch + scratch_floats;
    for (int64_t problem = begin / units; begin < end; ++problem) {
      const int64_t last = std::min(end, (problem + 1) * units);
      const float* packed = shared ? packed_by_all + problem * packed_floats : packed_here;
      if (!shared) kernel.pack(p, problem, keys(problem), 0, 1, packed_here);
      kernel.attend(p, problem, (begin - problem * units) * kernel.lanes,
                    std::min(p.queries, (last - problem * units) * kernel.lanes), keys(problem), packed, scratch);
      begin = last;
    }
    Workspace::of_thread().give_back();
  });
  Workspace::of_call().give_back();
}

}  // namespace fastvit
