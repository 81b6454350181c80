// token_depthwise_conv by its CUDA kernels, on the host.
#include "cuda_host.h"

// Each gives the bytes of shared memory of its greediest kernel.

extern "C" int64_t forward_host(const Arguments* arguments, void* out) {
  TokenDepthwiseConv op = describe(*arguments);
  op.out = out;
  HostDevice device;
  tokens::with_element(op.element, [&]<class T>() { tokens::convolve_tokens<T>(op, nullptr, device); });
  return device.most_shared;
}

// statistics: pre_mean, pre_var, mean, var; null where they are not to be found.
extern "C" int64_t training_host(const Arguments* arguments, void* out, void* conv, float* const* statistics) {
  TokenDepthwiseConvTraining op{};
  static_cast<TokenDepthwiseConv&>(op) = describe(*arguments);
  op.out = out;
  op.conv = conv;
  op.pre_mean = statistics[0];
  op.pre_var = statistics[1];
  op.mean = statistics[2];
  op.var = statistics[3];
  HostDevice device;
  tokens::with_element(op.element, [&]<class T>() { tokens::train<T>(op, device); });
  return device.most_shared;
}

// gradients: of weight, bias, pre_norm's weight and bias, norm's weight and bias; null where they are not wanted.
extern "C" int64_t backward_host(const Arguments* arguments, const void* grad, int64_t grad_batch_stride,
                                 int64_t grad_token_stride, const void* conv, int pre_batch, int batch, void* dx,
                                 float* const* gradients) {
  TokenDepthwiseConvBackward op{};
  static_cast<TokenDepthwiseConv&>(op) = describe(*arguments);
  op.grad = grad;
  op.grad_batch_stride = grad_batch_stride;
  op.grad_token_stride = grad_token_stride;
  op.conv = conv;
  op.pre_batch_statistics = pre_batch != 0;
  op.batch_statistics = batch != 0;
  op.dx = dx;
  float** const places[] = {&op.dweight,        &op.dbias,        &op.dpre_norm_weight,
                            &op.dpre_norm_bias, &op.dnorm_weight, &op.dnorm_bias};
  for (float** place : places) *place = *gradients++;
  HostDevice device;
  tokens::with_element(op.element, [&]<class T>() { tokens::backward<T>(op, device); });
  return device.most_shared;
}
