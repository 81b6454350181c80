// token_depthwise_conv on a GPU: the sequence of kernels of a forward pass at inference, one in training, and a
// backward pass. device.run(kernel) launches a kernel, device.allocate<E>(n) allocates n elements until the end of the
// pass, and device.convolve<T>(op, conv) is convolve_tokens, compiled in one place.
#pragma once

#include "token_depthwise_conv/cuda_channels.h"
#include "token_depthwise_conv/cuda_gradient.h"

namespace fastvit::tokens {

// Whether vectors of V elements are aligned in every token of a tensor; true for a null one.
template <int V>
bool is_aligned(const void* data, int64_t batch_stride, int64_t token_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch_stride % V == 0 && token_stride % V == 0;
}

// Calls f.operator()<V, K, S>() for vector length, kernel and stride.
template <class T, class F>
void with_shape(const TokenDepthwiseConv& op, bool vectors, const F& f) {
  constexpr int V = 16 / sizeof(T);
  const auto with_stride = [&]<int K>() {
    op.stride == 1 ? f.template operator()<V, K, 1>() : f.template operator()<V, K, 2>();
  };
  if (!vectors || op.stride > 2) return f.template operator()<1, 0, 0>();
  switch (op.kernel) {
    case 3: return with_stride.template operator()<3>();
    case 5: return with_stride.template operator()<5>();
    case 7: return with_stride.template operator()<7>();
    default: return f.template operator()<1, 0, 0>();
  }
}

template <class T>
bool has_vectors(const TokenDepthwiseConv& op) {
  constexpr int V = 16 / sizeof(T);
  return op.channels % V == 0 && is_aligned<V>(op.x, op.x_batch_stride, op.x_token_stride) &&
         is_aligned<V>(op.out, op.channels, op.channels);
}

// If op.out is null, computes only the convolution's result.
template <class T, class Device>
void convolve_tokens(const TokenDepthwiseConv& op, void* conv, Device& device) {
  const bool vectors = has_vectors<T>(op) && is_aligned<16 / sizeof(T)>(conv, 0, 0);
  with_shape<T>(op, vectors, [&]<int V, int K, int S>() { device.run(Forward<T, V, K, S>(op, conv)); });
}

// --- In training -----------------------------------------------------------------------------------------------------

// Calls f.operator()<V>() with vectors or without.
template <class T, class F>
void with_vectors(bool vectors, const F& f) {
  vectors ? f.template operator()<16 / sizeof(T)>() : f.template operator()<1>();
}

// Mean and variance of the grid tokens, which become the norm's statistics.
template <class T, class Device>
void compute_statistics(const TokenDepthwiseConv& op, TokenView<const T> values, int64_t tokens, bool vectors,
                        ChannelNorm& norm, float* mean, float* var, const ChannelParameter& left_out, Device& device) {
  with_vectors<T>(vectors, [&]<int V>() {
    Statistics<T, V> kernel(op, values, tokens, nullptr);
    kernel.partials = device.template allocate<double>(kernel.division.splits * 3 * op.channels);
    device.run(kernel);
    device.run(MergeStatistics{{}, kernel.partials, kernel.division.splits, op.channels, mean, var, left_out});
  });
  norm.mean = {mean, Element::float32};
  norm.var = {var, Element::float32};
}

template <class T, class Device>
void train(TokenDepthwiseConvTraining op, Device& device) {
  const bool vectors = has_vectors<T>(op) && is_aligned<16 / sizeof(T)>(op.conv, 0, 0);
  if (op.pre_mean != nullptr) {
    compute_statistics<T>(op, input_of<T>(op), op.height * op.width, vectors, op.pre_norm, op.pre_mean, op.pre_var, {},
                          device);
  }
  if (op.mean == nullptr) return device.template convolve<T>(op, op.conv);
  TokenDepthwiseConv inner = op;
  inner.out = nullptr;
  inner.bias = {};  // the results would lack its digits
  device.template convolve<T>(inner, op.conv);
  const int64_t tokens = op.out_height * op.out_width;
  compute_statistics<T>(op, contiguous_view<const T>(op, op.conv, tokens), tokens, vectors, op.norm, op.mean, op.var,
                        op.bias, device);
  with_vectors<T>(vectors, [&]<int V>() { device.run(Finish<T, V>(op, op.conv)); });
}

// The gradients of a norm's parameters, if wanted. Returns the (2, C) sums with batch statistics, otherwise null.
template <class T, class Device>
const double* sum_norm(const TokenDepthwiseConv& op, const Step<T>& step, int64_t tokens, bool vectors,
                       bool batch_statistics, float* dweight, float* dbias, Device& device) {
  if (step.norm.mean.data == nullptr || !(batch_statistics || dweight != nullptr || dbias != nullptr)) return nullptr;
  double* sums = batch_statistics ? device.template allocate<double>(2 * op.channels) : nullptr;
  with_vectors<T>(vectors, [&]<int V>() {
    NormSums<T, V> kernel(op, step, tokens, nullptr);
    kernel.partials = device.template allocate<double>(kernel.division.splits * 2 * op.channels);
    device.run(kernel);
    device.run(
        SumPartials<double>{{}, kernel.partials, kernel.division.splits, 2, op.channels, 1, dbias, dweight, sums});
  });
  return sums;
}

template <class T, class Device>
void backward(const TokenDepthwiseConvBackward& op, Device& device) {
  constexpr int lanes = 16 / sizeof(T);
  const bool vectors = has_vectors<T>(op) && is_aligned<lanes>(op.grad, op.grad_batch_stride, op.grad_token_stride) &&
                       is_aligned<lanes>(op.conv, 0, 0) && is_aligned<lanes>(op.dx, 0, 0);
  const int64_t in_tokens = op.height * op.width, out_tokens = op.out_height * op.out_width;
  const TokenView<const T> grad{static_cast<const T*>(op.grad), op.grad_batch_stride, op.grad_token_stride,
                                op.prefix_tokens};
  const Step<T> output_step{grad, contiguous_view<const T>(op, op.conv, out_tokens), op.norm, op.activation};
  const double* sums =
      sum_norm(op, output_step, out_tokens, vectors, op.batch_statistics, op.dnorm_weight, op.dnorm_bias, device);

  // With a pre_norm or pre_activation, dt comes first, stored in dx.
  const bool wants_pre_sums =
      op.pre_norm.mean.data != nullptr && (op.dpre_norm_weight != nullptr || op.dpre_norm_bias != nullptr);
  const bool has_pre_step = op.pre_norm.mean.data != nullptr || op.pre_activation != Activation::none;
  T* dt = static_cast<T*>(op.dx);
  if (dt == nullptr && wants_pre_sums) {
    dt = device.template allocate<T>(op.batch * (op.prefix_tokens + in_tokens) * op.channels);
  }
  // Batch statistics subtract any constant: the gradient of the bias is exactly zero, of which a sum would only give
  // the rounding error.
  float* dbias = op.batch_statistics ? nullptr : op.dbias;
  if (op.batch_statistics && op.dbias != nullptr) {
    device.run(SumPartials<float>{{}, nullptr, 0, 1, op.channels, 0, nullptr, op.dbias, nullptr});
  }
  const bool parameters = op.dweight != nullptr || dbias != nullptr;
  if (dt != nullptr || parameters) {
    with_shape<T>(op, vectors, [&]<int V, int K, int S>() {
      Gradient<T, V, K, S> kernel(op, {output_step, sums, grad, dt, !has_pre_step, nullptr});
      const int64_t taps = kernel.taps(), rows = taps + 1;
      if (parameters) kernel.task.partials = device.template allocate<float>(kernel.splits * rows * op.channels);
      device.run(kernel);
      if (!parameters) return;
      device.run(SumPartials<float>{
          {}, kernel.task.partials, kernel.splits, rows, op.channels, taps, op.dweight, dbias, nullptr});
    });
  }
  if (!has_pre_step || dt == nullptr) return;
  const Step<T> input_step{contiguous_view<const T>(op, dt, in_tokens), input_of<T>(op), op.pre_norm,
                           op.pre_activation};
  sums = sum_norm(op, input_step, in_tokens, vectors, op.pre_batch_statistics, op.dpre_norm_weight, op.dpre_norm_bias,
                  device);
  if (op.dx == nullptr) return;
  with_vectors<T>(vectors, [&]<int V>() { device.run(Apply<T, V>(op, input_step, grad, sums, dt)); });
}

// Calls f.operator()<T>() for the element type.
template <class F>
void with_element(Element element, const F& f) {
  switch (element) {
    case Element::float32: return f.template operator()<float>();
    case Element::bfloat16: return f.template operator()<BFloat16>();
    case Element::float16: return f.template operator()<Half>();
  }
}

}  // namespace fastvit::tokens
