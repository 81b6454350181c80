// fastvit::token_depthwise_conv on CPU: checks, division of the work, registration.
#include "token_depthwise_conv.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "../torch_abi.h"

namespace fastvit {
namespace {

constexpr int64_t kLanes = 16;            // channel blocks are whole vectors of the widest instruction set
constexpr int64_t kCacheFloats = 8192;    // of the L1 cache, for the rows of a channel block
constexpr int64_t kItemsPerThread = 4;    // enough for the threads to end at about the same time
constexpr int64_t kSerialNumel = 1 << 14;  // below it, waking other threads costs more than it saves
constexpr int64_t kCachedBytes = 3 << 20;   // results up to this size are taken to be in the L2 or L3 cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

ChannelParameter parameter(const std::optional<Tensor>& tensor, const char* name, int64_t numel) {
  if (!tensor) return {};
  check(tensor->is_cpu(), "token_depthwise_conv: ", name, " must be on the CPU, as x is");
  check(tensor->is_contiguous() && tensor->numel() == numel, "token_depthwise_conv: ", name, " must be contiguous with ",
        numel, " elements, got shape ", shape_of(*tensor));
  const Dtype dtype = tensor->dtype();
  check(dtype == Dtype::float32 || dtype == Dtype::bfloat16, "token_depthwise_conv: ", name,
        " must be float32 or bfloat16, got ", dtype);
  return {tensor->data<void>(), dtype == Dtype::bfloat16};
}

// The channel block as wide as the cache allows, evened out over the channels.
int64_t choose_channel_block(const TokenDepthwiseConv& op) {
  const int64_t rows = (op.kernel + 1) * op.padded_width + op.out_width + op.kernel * op.kernel + 3;
  const int64_t widest = std::max(kCacheFloats / rows / kLanes * kLanes, 2 * kLanes);
  return divide_up(divide_up(op.channels, divide_up(op.channels, widest)), kLanes) * kLanes;
}

// Whole maps where there are enough of them; otherwise blocks of rows, not so small that the rows which two blocks both
// read weigh much.
int64_t choose_row_block(const TokenDepthwiseConv& op, int64_t threads) {
  const int64_t maps = op.batch * op.channel_blocks;
  if (maps % threads == 0 || maps >= kItemsPerThread * threads) return op.out_height;
  const int64_t wanted = divide_up(op.out_height, divide_up(kItemsPerThread * threads, maps));
  return std::max(wanted, 2 * op.kernel);
}

struct FreeScratch {
  void operator()(float* scratch) const { operator delete(scratch, std::align_val_t{64}); }
};

void run(TokenDepthwiseConv& op, int64_t numel) {
  const int64_t threads = numel < kSerialNumel ? 1 : num_threads();
  op.padded_width = op.width + 2 * op.padding;
  op.channel_block = choose_channel_block(op);
  op.channel_blocks = divide_up(op.channels, op.channel_block);
  op.row_block = choose_row_block(op, threads);
  op.row_blocks = divide_up(op.out_height, op.row_block);
  const int64_t parameters = op.channel_blocks * (op.kernel * op.kernel + 4);  // as the kernel lays them out
  const int64_t rows = (op.kernel + 1) * op.padded_width + op.out_width;
  op.scratch_floats = op.channel_block * (parameters + rows);
  op.prefetch = numel * (op.is_bf16 ? 2 : 4) > kCachedBytes;
  const int64_t items = op.batch * op.channel_blocks * op.row_blocks;
  const auto kernel = FASTVIT_PER_ISA(token_depthwise_conv);
  parallel_for(0, items, divide_up(items, threads), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float, FreeScratch> scratch(
        static_cast<float*>(operator new(static_cast<size_t>(op.scratch_floats) * sizeof(float), std::align_val_t{64})));
    kernel(op, begin, end, scratch.get());
  });
}

Tensor token_depthwise_conv_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& pre_norm_weight, const std::optional<Tensor>& pre_norm_bias,
                                const std::optional<Tensor>& pre_norm_mean, const std::optional<Tensor>& pre_norm_var,
                                double pre_norm_eps, int64_t pre_activation, const std::optional<Tensor>& norm_weight,
                                const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& norm_mean,
                                const std::optional<Tensor>& norm_var, double norm_eps, int64_t activation,
                                int64_t height, int64_t width, int64_t stride, int64_t padding, int64_t prefix_tokens,
                                bool residual) {
  const Dtype dtype = x.dtype();
  check(dtype == Dtype::float32 || dtype == Dtype::bfloat16,
        "token_depthwise_conv: x must be float32 or bfloat16 on the CPU, got ", dtype);
  check(x.dim() == 3, "token_depthwise_conv: x must be (B, P + h*w, C), got shape ", shape_of(x));
  check(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3) && weight.size(2) > 0,
        "token_depthwise_conv: weight must be (C, 1, k, k), got shape ", shape_of(weight));
  const int64_t channels = x.size(2), kernel = weight.size(2);
  check(x.stride(2) == 1 || channels <= 1, "token_depthwise_conv: x must have adjacent channels, got stride ", x.stride(2));
  check(weight.size(0) == channels, "token_depthwise_conv: weight has ", weight.size(0), " channels, x has ", channels);
  check(height >= 0 && width >= 0 && prefix_tokens >= 0 && x.size(1) == prefix_tokens + height * width,
        "token_depthwise_conv: x has ", x.size(1), " tokens, ", prefix_tokens, " + ", height, " * ", width, " are expected");
  check(stride >= 1 && padding >= 0, "token_depthwise_conv: stride ", stride, " and padding ", padding,
        " must be at least 1 and 0");
  check(height + 2 * padding >= kernel && width + 2 * padding >= kernel, "token_depthwise_conv: a kernel of ", kernel,
        " is larger than the padded grid (", height, ", ", width, ")");
  check(pre_activation >= 0 && pre_activation <= 4 && activation >= 0 && activation <= 4,
        "token_depthwise_conv: activation codes are 0 to 4, got ", pre_activation, " and ", activation);
  check(pre_norm_mean.has_value() == pre_norm_var.has_value() && norm_mean.has_value() == norm_var.has_value(),
        "token_depthwise_conv: a norm needs both its mean and its variance");

  TokenDepthwiseConv op{};
  op.is_bf16 = dtype == Dtype::bfloat16;
  op.x_batch_stride = x.stride(0);
  op.x_token_stride = x.stride(1);
  op.batch = x.size(0);
  op.channels = channels;
  op.prefix_tokens = prefix_tokens;
  op.height = height;
  op.width = width;
  op.out_height = (height + 2 * padding - kernel) / stride + 1;
  op.out_width = (width + 2 * padding - kernel) / stride + 1;
  op.kernel = kernel;
  op.stride = stride;
  op.padding = padding;
  op.residual = residual;
  check(!residual || (op.out_height == height && op.out_width == width),
        "token_depthwise_conv: residual needs a convolution that keeps the grid (", height, ", ", width, "), this gives (",
        op.out_height, ", ", op.out_width, ")");
  check(weight.is_cpu(), "token_depthwise_conv: weight must be on the CPU, as x is");
  op.weight = {weight.data<void>(), weight.dtype() == Dtype::bfloat16};
  check(weight.is_contiguous() && (op.weight.is_bf16 || weight.dtype() == Dtype::float32),
        "token_depthwise_conv: weight must be contiguous, float32 or bfloat16, got ", weight.dtype());
  op.bias = parameter(bias, "bias", channels);
  op.pre_norm = {parameter(pre_norm_weight, "pre_norm_weight", channels),
                 parameter(pre_norm_bias, "pre_norm_bias", channels), parameter(pre_norm_mean, "pre_norm_mean", channels),
                 parameter(pre_norm_var, "pre_norm_var", channels), static_cast<float>(pre_norm_eps)};
  op.norm = {parameter(norm_weight, "norm_weight", channels), parameter(norm_bias, "norm_bias", channels),
             parameter(norm_mean, "norm_mean", channels), parameter(norm_var, "norm_var", channels),
             static_cast<float>(norm_eps)};
  op.pre_activation = static_cast<Activation>(pre_activation);
  op.activation = static_cast<Activation>(activation);

  Tensor out = empty({op.batch, prefix_tokens + op.out_height * op.out_width, channels}, x);
  if (out.numel() == 0) return out;
  op.x = x.data<void>();
  op.out = out.mutable_data<void>();
  run(op, out.numel());
  return out;
}

FASTVIT_REGISTER(token_depthwise_conv, "CPU", token_depthwise_conv_cpu);

}  // namespace
}  // namespace fastvit
