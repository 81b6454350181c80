// The operators fastvit::token_depthwise_conv_training and _backward as torch calls them: every check, then a device's
// own functions.
#pragma once

#include <tuple>

#include "token_depthwise_conv/op.h"

namespace fastvit {

// batch: the statistics are the batch's, which the forward pass computes and the backward pass is given.
struct TrainingNormArguments : NormArguments {
  using Schema = std::tuple<NormArguments, bool>;
  bool batch;
};
using TrainingArguments = ConvolutionArguments<TrainingNormArguments>;

template <void (*run)(TokenDepthwiseConvTraining& op, const Tensor& x)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_depthwise_conv_training_entry(
    Tensor x, TrainingArguments arguments) {
  constexpr char kOp[] = "token_depthwise_conv_training";
  make_last_axis_contiguous(x);
  arguments.make_parameters(x);
  TokenDepthwiseConvTraining op{};
  static_cast<TokenDepthwiseConv&>(op) = describe(kOp, x, arguments);
  const auto &pre_norm = arguments.pre_norm, &norm = arguments.norm;
  check(!(pre_norm.batch && pre_norm.mean) && !(norm.batch && norm.mean), kOp,
        ": a norm's statistics are either given or the batch's, got both");
  op.has_pre_norm = pre_norm.batch || pre_norm.mean;
  op.has_norm = norm.batch || norm.mean;
  Tensor out = empty_result(op, x);
  const bool keeps = op.has_norm || op.activation != Activation::none;
  Tensor conv = keeps ? empty_result(op, x) : empty({0}, x);
  const auto statistic = [&](bool used) { return empty({used ? op.channels : 0}, x, Dtype::float32); };
  Tensor pre_mean = statistic(pre_norm.batch), pre_var = statistic(pre_norm.batch);
  Tensor mean = statistic(norm.batch), var = statistic(norm.batch);
  check(op.batch > 0 || !(pre_norm.batch || norm.batch), kOp, ": an empty batch has no statistics");
  if (out.numel() > 0) {
    op.x = x.data<void>();
    op.out = out.mutable_data<void>();
    op.conv = keeps ? conv.mutable_data<void>() : nullptr;
    if (pre_norm.batch) op.pre_mean = pre_mean.mutable_data<float>(), op.pre_var = pre_var.mutable_data<float>();
    if (norm.batch) op.mean = mean.mutable_data<float>(), op.var = var.mutable_data<float>();
    run(op, x);
  }
  return {std::move(out), std::move(conv), std::move(pre_mean), std::move(pre_var), std::move(mean), std::move(var)};
}

// `run` is called with an empty batch, too, to zero the gradients of the parameters.
template <void (*run)(TokenDepthwiseConvBackward& op, const Tensor& x)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_depthwise_conv_backward_entry(
    Tensor grad, Tensor x, const Tensor& conv, TrainingArguments arguments, bool x_grad, bool parameter_grads) {
  constexpr char kOp[] = "token_depthwise_conv_backward";
  make_last_axis_contiguous(grad);
  make_last_axis_contiguous(x);
  arguments.make_parameters(x);
  TokenDepthwiseConvBackward op{};
  static_cast<TokenDepthwiseConv&>(op) = describe(kOp, x, arguments);
  const auto &pre_norm = arguments.pre_norm, &norm = arguments.norm;
  const int64_t tokens = op.prefix_tokens + op.out_height * op.out_width;
  check(grad.dim() == 3 && grad.size(0) == op.batch && grad.size(1) == tokens && grad.size(2) == op.channels &&
            (grad.stride(2) == 1 || op.channels <= 1 || grad.numel() == 0) && grad.dtype() == x.dtype() &&
            grad.device_type() == x.device_type(),
        kOp, ": grad must be (", op.batch, ", ", tokens, ", ", op.channels,
        ") with adjacent channels, of x's dtype and device, got ", shape_of(grad), " ", grad.dtype());
  check((!pre_norm.batch || pre_norm.mean) && (!norm.batch || norm.mean), kOp,
        ": the statistics of the forward pass are missing");
  op.has_pre_norm = pre_norm.mean.has_value();
  op.has_norm = norm.mean.has_value();
  const bool keeps = op.has_norm || op.activation != Activation::none;
  check(conv.numel() == (keeps ? grad.numel() : 0) && conv.is_contiguous() && conv.dtype() == x.dtype() &&
            conv.device_type() == x.device_type(),
        kOp, ": conv must be what the forward pass returned");
  op.pre_batch_statistics = pre_norm.batch;
  op.batch_statistics = norm.batch;
  op.grad_batch_stride = grad.stride(0);
  op.grad_token_stride = grad.stride(1);
  op.x = x.data<void>();
  op.grad = grad.data<void>();
  op.conv = conv.numel() > 0 ? conv.data<void>() : nullptr;
  Tensor dx = x_grad ? empty({op.batch, x.size(1), op.channels}, x) : empty({0}, x);
  op.dx = x_grad ? dx.mutable_data<void>() : nullptr;
  const auto gradient = [&](const OptionalTensor& parameter, float*& data) {
    const bool wanted = parameter && parameter_grads;
    Tensor tensor = empty({wanted ? op.channels : 0}, x, Dtype::float32);
    data = wanted ? tensor.mutable_data<float>() : nullptr;
    return tensor;
  };
  Tensor dweight = parameter_grads ? empty({op.channels, 1, op.kernel, op.kernel}, x, Dtype::float32)
                                   : empty({0}, x, Dtype::float32);
  op.dweight = parameter_grads ? dweight.mutable_data<float>() : nullptr;
  Tensor dbias = gradient(arguments.bias, op.dbias);
  Tensor dpre_norm_weight = gradient(pre_norm.weight, op.dpre_norm_weight);
  Tensor dpre_norm_bias = gradient(pre_norm.bias, op.dpre_norm_bias);
  Tensor dnorm_weight = gradient(norm.weight, op.dnorm_weight);
  Tensor dnorm_bias = gradient(norm.bias, op.dnorm_bias);
  if (op.channels > 0) run(op, x);
  return {std::move(dx),
          std::move(dweight),
          std::move(dbias),
          std::move(dpre_norm_weight),
          std::move(dpre_norm_bias),
          std::move(dnorm_weight),
          std::move(dnorm_bias)};
}

}  // namespace fastvit
