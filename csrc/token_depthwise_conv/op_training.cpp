// fastvit::token_depthwise_conv_training and _backward on the CPU: the sequence of passes, computations per channel
// between them, registration.
#include "token_depthwise_conv/cpu_training.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/bfloat16.h"
#include "common/workspace.h"
#include "token_depthwise_conv/cpu_division.h"
#include "token_depthwise_conv/op_training.h"

namespace fastvit {
namespace {

constexpr int64_t kMapFloats = 1 << 16;    // of the L2 cache, for the maps of a channel block
constexpr int64_t kRingFloats = 3 << 13;   // of the L1 and L2 cache, for the rows of one
constexpr int64_t kTokenFloats = 1 << 14;  // of the L1 and L2 cache, for sums and parameters only
constexpr int64_t kMomentFloats = 5;       // per channel, while its moments are computed

using Kernel = void (*)(const TokenDepthwiseConvPass&, int64_t, int64_t, float*);

TokenDepthwiseConvPass pass_of(const TokenDepthwiseConv& op) {
  TokenDepthwiseConvPass pass{};
  static_cast<TokenDepthwiseConv&>(pass) = op;
  pass.padded_width = op.width + 2 * op.padding;
  pass.ring_rows = rows_at_once(op);
  pass.row_block = op.out_height;
  pass.row_blocks = 1;
  return pass;
}

// per_channel: floats of scratch memory that a kernel needs per channel of a block, besides its Block.
void run_divided(TokenDepthwiseConvPass& pass, Kernel kernel, int64_t per_channel) {
  pass.scratch_floats =
      block_floats(pass) + pass.channel_blocks * pass.direct_floats + pass.channel_block * per_channel;
  pass.items = pass.batch * pass.channel_blocks;
  if (pass.items == 0) return;
  pass.grain = divide_up(pass.items, num_threads());
  parallel_for(0, pass.items, pass.grain, [&](int64_t begin, int64_t end) {
    Workspace& workspace = Workspace::of_thread();
    kernel(pass, begin, end, workspace.take(pass.scratch_floats));
    workspace.give_back();
  });
}

void run_pass(TokenDepthwiseConvPass& pass, Kernel kernel, int64_t per_channel, int64_t cache_floats) {
  set_channel_block(pass, cache_floats, (pass.ring_rows + 1) * pass.padded_width + per_channel, 1);
  run_divided(pass, kernel, per_channel);
}

// A pass over single tokens, without a ring buffer; per_channel includes parameters that are not in scratch memory.
void run_token_pass(TokenDepthwiseConvPass& pass, Kernel kernel, int64_t per_channel) {
  pass.ring_rows = pass.padded_width = 0;
  run_pass(pass, kernel, per_channel, kTokenFloats);
}

// Adds up the images' sums in double; kind k of channel c is at [k * channels + c].
std::vector<double> add_images(const float* sums, int64_t batch, int64_t kinds, int64_t channels) {
  std::vector<double> total(static_cast<size_t>(kinds * channels));
  for (int64_t image = 0; image < batch; ++image) {
    for (size_t i = 0; i < total.size(); ++i) total[i] += *sums++;
  }
  return total;
}

// Mean and variance over all images from the moments of each, of `tokens` tokens.
void combine_moments(const float* moments, int64_t batch, int64_t channels, int64_t tokens, float* mean, float* var) {
  const double share = 1.0 / static_cast<double>(tokens), images = static_cast<double>(batch);
  for (int64_t c = 0; c < channels; ++c) {
    const auto moment = [&](int64_t image, int64_t kind) -> double {
      return moments[(image * 3 + kind) * channels + c];
    };
    double center = 0.0;
    for (int64_t image = 0; image < batch; ++image) center += moment(image, 0) + share * moment(image, 1);
    center /= images;
    double squares = 0.0;
    for (int64_t image = 0; image < batch; ++image) {
      const double apart = moment(image, 0) - center;
      squares += share * (moment(image, 2) + 2.0 * apart * moment(image, 1)) + apart * apart;
    }
    mean[c] = static_cast<float>(center);
    var[c] = static_cast<float>(squares / images);
  }
}

float read(const ChannelParameter& parameter, int64_t channel, float absent) {
  if (parameter.data == nullptr) return absent;
  if (parameter.element == Element::float32) return static_cast<const float*>(parameter.data)[channel];
  return float_of_bfloat16(static_cast<const uint16_t*>(parameter.data)[channel]);
}

// Mean and variance, which become the norm's statistics; f(moments) computes the moments of every image. `left_out` is
// a bias that the mean takes away again, but not a NaN or infinity.
template <class F>
void compute_statistics(const TokenDepthwiseConv& op, int64_t tokens, float* mean, float* var, ChannelNorm& norm,
                        const ChannelParameter& left_out, const F& f) {
  std::vector<float> moments(static_cast<size_t>(op.batch * 3 * op.channels));
  f(moments.data());
  combine_moments(moments.data(), op.batch, op.channels, tokens, mean, var);
  for (int64_t c = 0; c < op.channels; ++c) var[c] += 0.0f * read(left_out, c, 0.0f);
  norm.mean = {mean, Element::float32};
  norm.var = {var, Element::float32};
}

// The plain convolution into op.conv; or, with its moments, without the bias, whose digits the results would lack.
void convolve(const TokenDepthwiseConvTraining& op, float* moments) {
  TokenDepthwiseConvPass pass = pass_of(op);
  pass.out = op.conv;
  pass.moments = moments;
  if (moments != nullptr) pass.bias = {};
  pass.norm = {};
  pass.activation = Activation::none;
  pass.residual = false;
  pass.direct = divide_directly(pass);
  if (pass.direct) {
    pass.ring_rows = pass.padded_width = 0;
  } else {
    set_channel_block(pass, kRingFloats, (pass.ring_rows + 1) * pass.padded_width + kMomentFloats, 1);
  }
  run_divided(pass, FASTVIT_PER_ISA(convolve_with_moments, pass.element), kMomentFloats);
}

void train(TokenDepthwiseConvTraining& op, const Tensor&) {
  if (op.pre_mean != nullptr) {
    compute_statistics(op, op.height * op.width, op.pre_mean, op.pre_var, op.pre_norm, {}, [&](float* moments) {
      TokenDepthwiseConvPass pass = pass_of(op);
      pass.moments = moments;
      run_token_pass(pass, FASTVIT_PER_ISA(token_moments, pass.element), kMomentFloats);
    });
  }
  if (op.conv == nullptr) return run_token_depthwise_conv(op);
  if (op.mean != nullptr) {
    compute_statistics(op, op.out_height * op.out_width, op.mean, op.var, op.norm, op.bias,
                       [&](float* moments) { convolve(op, moments); });
  } else {
    convolve(op, nullptr);
  }
  TokenDepthwiseConvPass pass = pass_of(op);
  pass.conv = op.conv;
  pass.streams = is_streamed(op, op.out, op.batch * op.out_height * op.out_width * op.channels);
  run_token_pass(pass, FASTVIT_PER_ISA(finish, pass.element), 3);
}

// A norm in the backward pass: its coefficients, and its gradients from the sums of dn and dn (c - mean).
class NormGradient {
 public:
  NormGradient(const ChannelNorm& norm, bool exists, int64_t channels)
      : channels_(channels), exists_(exists), values_(static_cast<size_t>(exists ? 7 * channels : 0)) {
    for (int64_t c = 0; exists && c < channels; ++c) {
      const float deviation = std::sqrt(read(norm.var, c, 1.0f) + norm.eps);
      row(kMean)[c] = read(norm.mean, c, 0.0f);
      row(kInverse)[c] = 1.0f / deviation;
      row(kScale)[c] = read(norm.weight, c, 1.0f) / deviation;
      row(kBias)[c] = read(norm.bias, c, 0.0f);
      if (std::isinf(row(kScale)[c])) {  // applied as in finish, to c itself
        row(kCenter)[c] = row(kMean)[c];
        row(kBias)[c] -= row(kMean)[c] * row(kScale)[c];
        row(kMean)[c] = 0.0f;
      }
    }
  }

  NormCoefficients coefficients(bool batch_statistics) {
    if (!exists_) return {};
    if (!batch_statistics) return {row(kMean), row(kScale), row(kBias), nullptr, nullptr};
    return {row(kMean), row(kScale), row(kBias), row(kSlope), row(kOffset)};
  }

  // Adds what all dn are less than, the third of the sums, to that of dn. (That of c - mean is zero.)
  void add_common(std::vector<double>& sums, int64_t tokens) {
    for (int64_t c = 0; c < channels_; ++c) {
      const double common = static_cast<double>(tokens) * sums[static_cast<size_t>(2 * channels_ + c)];
      sums[static_cast<size_t>(c)] += common;
      sums[static_cast<size_t>(channels_ + c)] += row(kCenter)[c] * common;
    }
  }

  // Adds the gradients through the batch's statistics, which are over `count` values.
  void add_statistics_gradients(const std::vector<double>& sums, int64_t count) {
    for (int64_t c = 0; c < channels_; ++c) {
      const double inverse = row(kInverse)[c], share = 1.0 / static_cast<double>(count);
      row(kOffset)[c] = static_cast<float>(-share * sums[static_cast<size_t>(c)]);
      row(kSlope)[c] = static_cast<float>(-share * inverse * inverse * centred(sums, c));
    }
  }

  void store_affine(const std::vector<double>& sums, float* weight, float* bias) {
    for (int64_t c = 0; c < channels_; ++c) {
      if (weight != nullptr) weight[c] = static_cast<float>(centred(sums, c) * row(kInverse)[c]);
      if (bias != nullptr) bias[c] = static_cast<float>(sums[static_cast<size_t>(c)]);
    }
  }

  // The sum of the gradient of the norm's input, which with batch statistics is zero, or NaN where that gradient is.
  void store_sum(const std::vector<double>& sums, bool batch_statistics, float* to) {
    for (int64_t c = 0; c < channels_; ++c) {
      double scale = exists_ ? row(kScale)[c] : 1.0;
      if (batch_statistics) scale = 0.0 * (scale + row(kSlope)[c] + row(kOffset)[c]);
      to[c] = static_cast<float>(scale * sums[static_cast<size_t>(c)]);
    }
  }

 private:
  enum Row { kMean, kScale, kBias, kSlope, kOffset, kInverse, kCenter };
  // The sum of dn (c - mean); kCenter is what the passes left out of that mean.
  double centred(const std::vector<double>& sums, int64_t c) {
    return sums[static_cast<size_t>(channels_ + c)] - row(kCenter)[c] * sums[static_cast<size_t>(c)];
  }
  float* row(Row index) { return values_.data() + index * channels_; }

  int64_t channels_;
  bool exists_;
  std::vector<float> values_;
};

// From [tap][channel] to [channel][tap].
void store_weight(const std::vector<double>& sums, int64_t area, int64_t channels, float* weight) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < area; ++tap) {
      *weight++ = static_cast<float>(sums[static_cast<size_t>(tap * channels + c)]);
    }
  }
}

template <class Bits>
bool are_finite(const void* data, int64_t count, Bits exponent) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= (static_cast<const Bits*>(data)[i] & exponent) != exponent;
  return finite;
}

bool has_finite_taps(const TokenDepthwiseConv& op) {
  const int64_t count = op.channels * op.kernel * op.kernel;
  return op.weight.element == Element::float32 ? are_finite<uint32_t>(op.weight.data, count, 0x7f800000)
                                               : are_finite<uint16_t>(op.weight.data, count, 0x7f80);
}

void clear_gradients(const TokenDepthwiseConvBackward& op) {
  if (op.dweight != nullptr) std::fill_n(op.dweight, op.channels * op.kernel * op.kernel, 0.0f);
  for (float* gradient : {op.dbias, op.dpre_norm_weight, op.dpre_norm_bias, op.dnorm_weight, op.dnorm_bias}) {
    if (gradient != nullptr) std::fill_n(gradient, op.channels, 0.0f);
  }
}

// The pass backward through a 3x3 convolution.
void compute_3x3_gradients(TokenDepthwiseConvPass& pass) {
  const int64_t rows = kDcRows * (pass.out_width + 2) + kMaxRows * pass.width;
  pass.ring_rows = kMaxRows;
  run_pass(pass, FASTVIT_PER_ISA(conv_3x3_gradients, pass.element), rows + 9 + 2 * 9 + 2 * 4, kRingFloats);
}

// The same for any convolution.
void compute_gradients(TokenDepthwiseConvPass& pass) {
  pass.ring_rows = pass.height;
  // Besides the map of inputs that of gradients, with a Block of its own: see TransposedConv in cpu_passes.h.
  const int64_t area = pass.kernel * pass.kernel, padding = std::max<int64_t>(pass.kernel - 1 - pass.padding, 0);
  const int64_t transposed_height = pass.height + pass.kernel - 1 - 2 * padding;
  const int64_t transposed = (transposed_height + 1) * (pass.width + pass.kernel - 1) + area + 4;
  const int64_t values = kMaxRows * pass.width;
  run_pass(pass, FASTVIT_PER_ISA(conv_gradients, pass.element), transposed + values + 4 + area, kMapFloats);
}

void backward(TokenDepthwiseConvBackward& op, const Tensor&) {
  if (op.batch == 0) return clear_gradients(op);
  const int64_t area = op.kernel * op.kernel, kinds = 2 * op.channels;
  NormGradient pre(op.pre_norm, op.has_pre_norm, op.channels), post(op.norm, op.has_norm, op.channels);
  TokenDepthwiseConvPass pass = pass_of(op);
  pass.norm = {};  // the passes start from the plain convolution's result
  pass.conv = op.conv;
  pass.grad = op.grad;
  pass.grad_batch_stride = op.grad_batch_stride;
  pass.grad_token_stride = op.grad_token_stride;
  pass.dx = op.dx;
  pass.dx_of_norm_output = op.pre_batch_statistics;
  pass.streams = !pass.dx_of_norm_output && is_streamed(op, op.dx, op.batch * op.height * op.width * op.channels);
  pass.pre = pre.coefficients(op.pre_batch_statistics);
  pass.post = post.coefficients(op.batch_statistics);

  const bool parameters = op.dweight != nullptr;
  const bool wants_pre_sums = op.has_pre_norm && (parameters || (op.pre_batch_statistics && op.dx != nullptr));
  const bool wants_sums = parameters || op.batch_statistics;
  Workspace& workspace = Workspace::of_call();
  float* sums = workspace.take(op.batch * (2 * kinds + (1 + area) * op.channels));
  float* pre_sums = sums + op.batch * (kinds + op.channels);
  float* weight_sums = pre_sums + op.batch * kinds;

  std::vector<double> total;
  if (op.batch_statistics) {
    pass.sums = sums;
    TokenDepthwiseConvPass sums_pass = pass;
    run_token_pass(sums_pass, FASTVIT_PER_ISA(norm_gradient_sums, pass.element), 4);
    total = add_images(sums, op.batch, 3, op.channels);
    const int64_t tokens = op.out_height * op.out_width;
    post.add_common(total, tokens);
    post.add_statistics_gradients(total, op.batch * tokens);
    pass.sums = nullptr;  // known
  } else if (wants_sums) {
    pass.sums = sums;
  }
  pass.pre_sums = wants_pre_sums ? pre_sums : nullptr;
  pass.weight_sums = parameters ? weight_sums : nullptr;
  // The passes of a 3x3 convolution multiply inputs and taps by zeros around the gradients, too, where that is
  // harmless.
  bool is_done = false;
  std::vector<double> weight_total;
  if (is_3x3(pass) && has_finite_taps(pass)) {
    compute_3x3_gradients(pass);
    if (parameters) weight_total = add_images(weight_sums, op.batch, area, op.channels);
    is_done = std::all_of(weight_total.begin(), weight_total.end(), [](double sum) { return std::isfinite(sum); });
  }
  if (!is_done) {
    compute_gradients(pass);
    if (parameters) weight_total = add_images(weight_sums, op.batch, area, op.channels);
  }
  if (pass.sums != nullptr) total = add_images(sums, op.batch, 2, op.channels);
  std::vector<double> pre_total;
  if (wants_pre_sums) pre_total = add_images(pre_sums, op.batch, 2, op.channels);
  if (op.pre_batch_statistics && op.dx != nullptr) {
    pre.add_statistics_gradients(pre_total, op.batch * op.height * op.width);
    run_token_pass(pass, FASTVIT_PER_ISA(pre_norm_gradient, pass.element), 5);
  }
  if (parameters) {
    store_weight(weight_total, area, op.channels, op.dweight);
    if (op.dbias != nullptr) post.store_sum(total, op.batch_statistics, op.dbias);
    if (op.has_norm) post.store_affine(total, op.dnorm_weight, op.dnorm_bias);
    if (op.has_pre_norm) pre.store_affine(pre_total, op.dpre_norm_weight, op.dpre_norm_bias);
  }
  workspace.give_back();
}

FASTVIT_REGISTER(token_depthwise_conv_training, "CPU", token_depthwise_conv_training_entry<train>);
FASTVIT_REGISTER(token_depthwise_conv_backward, "CPU", token_depthwise_conv_backward_entry<backward>);

}  // namespace
}  // namespace fastvit
