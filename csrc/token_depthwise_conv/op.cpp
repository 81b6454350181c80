// fastvit::token_depthwise_conv on the CPU: dividing the work, registration.
#include "token_depthwise_conv/cpu.h"

#include <algorithm>

#include "common/workspace.h"
#include "token_depthwise_conv/cpu_division.h"
#include "token_depthwise_conv/op.h"

namespace fastvit {
namespace {

constexpr int64_t kCacheFloats = 12288;    // of the L1 cache, for the input rows of a channel block
constexpr int64_t kItemsPerThread = 4;     // enough for threads to finish at about the same time
constexpr int64_t kSerialNumel = 1 << 17;  // smaller results are faster on one thread

// Whole maps if there are enough of them, otherwise blocks of rows, large compared with the rows that two blocks both
// read.
int64_t choose_row_block(const TokenDepthwiseConvWork& work, int64_t threads) {
  const int64_t maps = work.batch * work.channel_blocks;
  if (maps % threads == 0 || maps >= kItemsPerThread * threads) return work.out_height;
  const int64_t wanted = divide_up(work.out_height, divide_up(kItemsPerThread * threads, maps));
  return std::max(wanted, 2 * work.kernel);
}

void run(const TokenDepthwiseConv& op, const Tensor&) { run_token_depthwise_conv(op); }

FASTVIT_REGISTER(token_depthwise_conv, "CPU", token_depthwise_conv_entry<run>);

}  // namespace

TokenDepthwiseConvWork divide(const TokenDepthwiseConv& op) {
  const int64_t numel = op.batch * op.out_height * op.out_width * op.channels;
  const int64_t threads = numel < kSerialNumel ? 1 : num_threads();
  TokenDepthwiseConvWork work{};
  static_cast<TokenDepthwiseConv&>(work) = op;
  work.direct = divide_directly(work);
  if (!work.direct) {
    work.padded_width = op.width + 2 * op.padding;
    work.ring_rows = rows_at_once(op);
    set_channel_block(work, kCacheFloats, (work.ring_rows + 1) * work.padded_width + op.kernel * op.kernel + 3);
  }
  work.streams = is_streamed(work, work.out, numel);
  work.row_block = choose_row_block(work, threads);
  work.row_blocks = divide_up(op.out_height, work.row_block);
  work.scratch_floats = block_floats(work) + work.channel_blocks * work.direct_floats;
  work.items = op.batch * work.channel_blocks * work.row_blocks;
  work.grain = divide_up(work.items, threads);
  return work;
}

void run_token_depthwise_conv(const TokenDepthwiseConv& op) {
  const TokenDepthwiseConvWork work = divide(op);
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv, work.element);
  parallel_for(0, work.items, work.grain, [&](int64_t begin, int64_t end) {
    kernel(work, begin, end, Workspace::of_thread().take(work.scratch_floats));
    Workspace::of_thread().give_back();
  });
}

}  // namespace fastvit
