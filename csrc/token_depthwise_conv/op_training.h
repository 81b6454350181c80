// The operators fastvit::token_depthwise_conv_training and _backward as torch calls them: every check, then a device's
// own functions.
#pragma once

#include <optional>
#include <tuple>

#include "token_depthwise_conv/op.h"

namespace fastvit {

template <void (*run)(TokenDepthwiseConvTraining& op, const Tensor& x)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_depthwise_conv_training_entry(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& pre_norm_weight, const std::optional<Tensor>& pre_norm_bias,
    const std::optional<Tensor>& pre_norm_mean, const std::optional<Tensor>& pre_norm_var, double pre_norm_eps,
    bool pre_norm_batch, int64_t pre_activation, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& norm_mean,
    const std::optional<Tensor>& norm_var, double norm_eps, bool norm_batch, int64_t activation, int64_t height,
    int64_t width, int64_t stride, int64_t padding, int64_t prefix_tokens, bool residual) {
  TokenDepthwiseConvTraining op{};
  static_cast<TokenDepthwiseConv&>(op) =
      describe(x, weight, bias, {pre_norm_weight, pre_norm_bias, pre_norm_mean, pre_norm_var, pre_norm_eps},
               pre_activation, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps}, activation,
               {height, width, stride, padding, prefix_tokens, residual});
  check(!(pre_norm_batch && pre_norm_mean) && !(norm_batch && norm_mean),
        "token_depthwise_conv: statistics are given, or found in the batch, not both");
  op.has_pre_norm = pre_norm_batch || pre_norm_mean;
  op.has_norm = norm_batch || norm_mean;
  Tensor out = empty_result(op, x);
  const bool keeps = op.has_norm || op.activation != Activation::none;
  Tensor conv = keeps ? empty_result(op, x) : empty({0}, x);
  const auto statistic = [&](bool used) { return empty({used ? op.channels : 0}, x, Dtype::float32); };
  Tensor pre_mean = statistic(pre_norm_batch), pre_var = statistic(pre_norm_batch);
  Tensor mean = statistic(norm_batch), var = statistic(norm_batch);
  check(op.batch > 0 || !(pre_norm_batch || norm_batch), "token_depthwise_conv: an empty batch has no statistics");
  if (out.numel() > 0) {
    op.x = x.data<void>();
    op.out = out.mutable_data<void>();
    op.conv = keeps ? conv.mutable_data<void>() : nullptr;
    if (pre_norm_batch) op.pre_mean = pre_mean.mutable_data<float>(), op.pre_var = pre_var.mutable_data<float>();
    if (norm_batch) op.mean = mean.mutable_data<float>(), op.var = var.mutable_data<float>();
    run(op, x);
  }
  return {std::move(out), std::move(conv), std::move(pre_mean), std::move(pre_var), std::move(mean), std::move(var)};
}

// With an empty batch `run` is called too, to make the parameters' gradients zero.
template <void (*run)(TokenDepthwiseConvBackward& op, const Tensor& x)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_depthwise_conv_backward_entry(
    const Tensor& grad, const Tensor& x, const Tensor& conv, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& pre_norm_weight, const std::optional<Tensor>& pre_norm_bias,
    const std::optional<Tensor>& pre_norm_mean, const std::optional<Tensor>& pre_norm_var, double pre_norm_eps,
    bool pre_norm_batch, int64_t pre_activation, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& norm_mean,
    const std::optional<Tensor>& norm_var, double norm_eps, bool norm_batch, int64_t activation, int64_t height,
    int64_t width, int64_t stride, int64_t padding, int64_t prefix_tokens, bool residual, bool x_grad,
    bool parameter_grads) {
  TokenDepthwiseConvBackward op{};
  static_cast<TokenDepthwiseConv&>(op) =
      describe(x, weight, bias, {pre_norm_weight, pre_norm_bias, pre_norm_mean, pre_norm_var, pre_norm_eps},
               pre_activation, {norm_weight, norm_bias, norm_mean, norm_var, norm_eps}, activation,
               {height, width, stride, padding, prefix_tokens, residual});
  const int64_t tokens = op.prefix_tokens + op.out_height * op.out_width;
  check(grad.dim() == 3 && grad.size(0) == op.batch && grad.size(1) == tokens && grad.size(2) == op.channels &&
            (grad.stride(2) == 1 || op.channels <= 1) && grad.dtype() == x.dtype() &&
            grad.device_type() == x.device_type(),
        "token_depthwise_conv: grad must be (", op.batch, ", ", tokens, ", ", op.channels,
        ") with adjacent channels, of x's dtype and device, got ", shape_of(grad), " ", grad.dtype());
  check((!pre_norm_batch || pre_norm_mean) && (!norm_batch || norm_mean),
        "token_depthwise_conv: backward needs the statistics of the forward pass");
  op.has_pre_norm = pre_norm_mean.has_value();
  op.has_norm = norm_mean.has_value();
  const bool keeps = op.has_norm || op.activation != Activation::none;
  check(conv.numel() == (keeps ? grad.numel() : 0) && conv.is_contiguous() && conv.dtype() == x.dtype() &&
            conv.device_type() == x.device_type(),
        "token_depthwise_conv: conv must be what the forward pass returned");
  op.pre_batch_statistics = pre_norm_batch;
  op.batch_statistics = norm_batch;
  op.grad_batch_stride = grad.stride(0);
  op.grad_token_stride = grad.stride(1);
  op.x = x.data<void>();
  op.grad = grad.data<void>();
  op.conv = conv.numel() > 0 ? conv.data<void>() : nullptr;
  Tensor dx = x_grad ? empty({op.batch, x.size(1), op.channels}, x) : empty({0}, x);
  op.dx = x_grad ? dx.mutable_data<void>() : nullptr;
  const auto gradient = [&](bool exists, float*& data) {
    Tensor tensor = empty({exists && parameter_grads ? op.channels : 0}, x, Dtype::float32);
    data = exists && parameter_grads ? tensor.mutable_data<float>() : nullptr;
    return tensor;
  };
  Tensor dweight = parameter_grads ? empty({op.channels, 1, op.kernel, op.kernel}, x, Dtype::float32)
                                   : empty({0}, x, Dtype::float32);
  op.dweight = parameter_grads ? dweight.mutable_data<float>() : nullptr;
  Tensor dbias = gradient(bias.has_value(), op.dbias);
  Tensor dpre_norm_weight = gradient(pre_norm_weight.has_value(), op.dpre_norm_weight);
  Tensor dpre_norm_bias = gradient(pre_norm_bias.has_value(), op.dpre_norm_bias);
  Tensor dnorm_weight = gradient(norm_weight.has_value(), op.dnorm_weight);
  Tensor dnorm_bias = gradient(norm_bias.has_value(), op.dnorm_bias);
  run(op, x);
  return {std::move(dx),
          std::move(dweight),
          std::move(dbias),
          std::move(dpre_norm_weight),
          std::move(dpre_norm_bias),
          std::move(dnorm_weight),
          std::move(dnorm_bias)};
}

}  // namespace fastvit
