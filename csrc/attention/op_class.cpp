// Attention of a few queries: dividing the work among threads.
#include "attention/args_class.h"

#include "attention/op.h"

namespace fastvit {
namespace {

// Less than kSerialProducts, since a multiply-add takes longer than in a large product: no key or value is read twice.
constexpr int64_t kSerialClassProducts = kSerialProducts / 8;
constexpr int64_t kKeysOfAPart = 64;  // at least

}  // namespace

void run_class_attention(const MaskedAttentionParams& p, const KeyLists& keys) {
  const ClassAttentionKernel kernel = FASTVIT_PER_ISA(class_attention_kernel, p.element)(p);
  const int64_t problems = p.batch * p.heads, products = 2 * p.queries * p.keys * p.dim;
  // A head's keys are split if there are fewer heads than threads and enough keys for each.
  const int64_t parts =
      std::clamp<int64_t>(num_threads() / problems, 1,
                          std::max<int64_t>(1, std::min(p.keys / kKeysOfAPart, products / kSerialClassProducts)));
  const int64_t partial = whole_lines(kernel.partial_floats), scratch = whole_lines(kernel.scratch_floats);
  float* partials = parts == 1 ? nullptr : Workspace::of_call().take(problems * parts * partial);
  const int64_t grain = grain_of(products / parts, kSerialClassProducts);
  parallel_for(0, problems * parts, grain, [&](int64_t begin, int64_t end) {
    float* memory = Workspace::of_thread().take(scratch + partial);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t problem = unit / parts, part = unit % parts;
      const AttentionKeys all = keys.of(problem / p.heads);
      const int64_t first = part * all.count / parts, last = (part + 1) * all.count / parts;
      float* to = parts == 1 ? memory + scratch : partials + unit * partial;
      kernel.attend(p, problem, {all.indices + first, last - first}, to, memory);
      if (parts == 1) kernel.combine(p, problem, to, 1, partial);
    }
    Workspace::of_thread().give_back();
  });
  if (parts > 1) {
    for (int64_t problem = 0; problem < problems; ++problem) {
      kernel.combine(p, problem, partials + problem * parts * partial, parts, partial);
    }
    Workspace::of_call().give_back();
  }
}

void run_class_attention_backward(const MaskedAttentionGradients& p, const KeyLists& keys) {
  const ClassAttentionBackwardKernel kernel = FASTVIT_PER_ISA(class_attention_backward_kernel, p.element)(p);
  const int64_t products = 5 * p.queries * p.keys * p.dim;
  const int64_t grain = grain_of(products, kSerialClassProducts);
  parallel_for(0, p.batch * p.heads, grain, [&](int64_t begin, int64_t end) {
    float* memory = Workspace::of_thread().take(kernel.scratch_floats);
    for (int64_t problem = begin; problem < end; ++problem) {
      kernel.attend(p, problem, keys.of(problem / p.heads), memory);
    }
    Workspace::of_thread().give_back();
  });
}

}  // namespace fastvit
