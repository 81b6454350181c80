// Training of token_depthwise_conv on the CPU: the passes over the tokens and their results.
//
// If a norm or an activation follows the convolution, its result is saved for later passes and for the backward pass.
// Passes compute sums per image, [image][kind][channel], which are added up in the order of the images: the result does
// not depend on the number of threads.
#pragma once

#include "token_depthwise_conv/cpu.h"

namespace fastvit {

// A norm and its gradient, each an array over the channels: n = (c - mean) scale + bias, and
// dc = scale (dn + slope (c - mean) + offset). With given statistics slope and offset are null, and without a norm all
// of them: n is c and dc is dn.
struct NormCoefficients {
  const float *mean, *scale, *bias, *slope, *offset;
};

constexpr int64_t kDcRows = 4;  // rows of the convolution's gradient in the ring buffer of conv_3x3_gradients

// An item of work is a block of channels of one map.
struct TokenDepthwiseConvPass : TokenDepthwiseConvWork {
  NormCoefficients pre, post;
  const void* conv;  // the convolution's result, laid out as out; null if nothing follows it
  const void* grad;
  int64_t grad_batch_stride, grad_token_stride;
  void* dx;                // null if not wanted
  bool dx_of_norm_output;  // dx becomes the gradient of pre_norm's output, without the residual's
  float* moments;          // kinds: center, sum of differences from it, sum of their squares; null if not wanted
  float* sums;             // kinds: dn, dn (c - mean); null if not wanted
  float* pre_sums;         // the same for pre_norm
  float* weight_sums;      // kinds: taps; null if not wanted
};

FASTVIT_DECLARE_PER_ISA(
    // Moments of x.
    void token_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);
    // The convolution's result as out, with its moments; norm, activation and residual must be absent from op.
    void convolve_with_moments(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);
    // From the convolution's result to out.
    void finish(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);
    // sums only, with a third kind: what every dn was less than in them.
    void norm_gradient_sums(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);
    // sums, pre_sums, weight_sums and dx, those that are wanted.
    void conv_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);
    // The same for a 3x3 convolution with padding 1 and stride 1 or 2.
    void conv_3x3_gradients(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);
    // dx through pre_norm.
    void pre_norm_gradient(const TokenDepthwiseConvPass& op, int64_t begin, int64_t end, float* scratch);)

}  // namespace fastvit
