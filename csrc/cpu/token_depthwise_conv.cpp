// fastvit::token_depthwise_conv on the CPU: division of the work, registration.
#include "token_depthwise_conv.h"

#include <algorithm>

#include "../token_depthwise_conv_entry.h"
#include "token_depthwise_conv_division.h"
#include "workspace.h"

namespace fastvit {
namespace {

constexpr int64_t kCacheFloats = 8192;     // of the L1 cache, for the rows of a channel block
constexpr int64_t kItemsPerThread = 4;     // enough for the threads to end at about the same time
constexpr int64_t kSerialNumel = 1 << 17;  // below it, waking other threads costs more than it saves

// Where nothing stands in front of the convolution or behind it but a norm and the residual. Not where neighbouring
// tokens of x lie in the same sets of the L1 cache (64 sets of 64 bytes), as with 1536 channels of float32: a walk
// along a row for every vector of channels would find nothing there any more. Columns come in pairs with stride 2.
bool goes_directly(const TokenDepthwiseConv& op) {
  const bool plain =
      op.pre_norm.mean.data == nullptr && op.pre_activation == Activation::none && op.activation == Activation::none;
  const int64_t lines = op.x_token_stride * (op.element == Element::float32 ? 4 : 2) / 64;
  return plain && is_3x3(op) && lines % 32 != 0 && (op.stride == 1 || op.width % 2 == 0);
}

// Whole maps where there are enough of them; otherwise blocks of rows, not so small that the rows which two blocks both
// read weigh much.
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
  check(op.element != Element::float16, "token_depthwise_conv: the CPU kernels take float32 and bfloat16, got float16");
  const int64_t numel = op.batch * op.out_height * op.out_width * op.channels;
  const int64_t threads = numel < kSerialNumel ? 1 : num_threads();
  TokenDepthwiseConvWork work{};
  static_cast<TokenDepthwiseConv&>(work) = op;
  work.padded_width = op.width + 2 * op.padding;
  work.direct = goes_directly(op);
  work.ring_rows = work.direct ? 0 : rows_at_once(op);
  const int64_t rows = work.direct ? op.kernel + 1 : work.ring_rows;  // of x, which are read again and again
  set_channel_block(work, kCacheFloats, (rows + 1) * work.padded_width + op.kernel * op.kernel + 3);
  work.row_block = choose_row_block(work, threads);
  work.row_blocks = divide_up(op.out_height, work.row_block);
  work.bytes = numel * (op.element == Element::float32 ? 4 : 2);
  work.scratch_floats = block_floats(work);
  work.items = op.batch * work.channel_blocks * work.row_blocks;
  work.grain = divide_up(work.items, threads);
  return work;
}

void run_token_depthwise_conv(const TokenDepthwiseConv& op) {
  const TokenDepthwiseConvWork work = divide(op);
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv);
  parallel_for(0, work.items, work.grain, [&](int64_t begin, int64_t end) {
    kernel(work, begin, end, Workspace::of_thread().take(work.scratch_floats));
    Workspace::of_thread().give_back();
  });
}

}  // namespace fastvit
