// fastvit::packed_leff on the CPU: a product, the depthwise convolution with two norms in it, and a product with the
// last norm and the residual in it. Prefix tokens go through every step, which is cheaper than cutting them off, and
// are put right at the end.
#include <cmath>

#include "common/bfloat16.h"
#include "common/float16.h"
#include "linear/op.h"
#include "token_depthwise_conv/cpu_division.h"
#include "token_depthwise_conv/op.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "leff";

// The convolution, in the schema's order (fastvit/ops/leff.py).
struct Depthwise {
  using Schema = std::tuple<Tensor, OptionalTensor, NormArguments, NormArguments>;
  Tensor weight;
  OptionalTensor bias;
  NormArguments pre_norm, norm;
};

struct Tokens {
  using Schema = std::tuple<int64_t, int64_t, int64_t>;
  int64_t height, width, prefix;
};

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

float value(const float* at) { return *at; }
float value(const Bfloat16* at) { return float_of_bfloat16(at->bits); }
float value(const Float16* at) { return float_of_float16(at->bits); }
void store(float value, float* to) { *to = value; }
void store(float value, Bfloat16* to) { to->bits = bfloat16_of_float(value); }
void store(float value, Float16* to) { to->bits = float16_of_float(value); }

// A row as the layer norm in front gives it.
template <class T>
void normalize(const T* row, int64_t channels, const Floats& weight, const Floats& bias, double eps, float* to) {
  double sum = 0.0, squares = 0.0;
  for (int64_t c = 0; c < channels; ++c) sum += value(row + c);
  const double mean = sum / static_cast<double>(channels);
  for (int64_t c = 0; c < channels; ++c) squares += (value(row + c) - mean) * (value(row + c) - mean);
  const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(channels) + eps);
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = weight.data() == nullptr ? 1.0 : weight.data()[c];
    const double shift = bias.data() == nullptr ? 0.0 : bias.data()[c];
    to[c] = static_cast<float>((value(row + c) - mean) * inverse * scale + shift);
  }
}

// What prefix tokens become: the residual, and in the official form what came out of the norm in front.
template <class T>
void put_prefix(const Tensor& x, const NormOfRows& norm, const OptionalTensor& residual, int64_t prefix, bool paper,
                Tensor& out) {
  const int64_t channels = out.size(2);
  const Floats weight(kOp, norm.weight, "norm_weight", channels), bias(kOp, norm.bias, "norm_bias", channels);
  std::vector<float> row(static_cast<size_t>(channels));
  for (int64_t image = 0; image < out.size(0); ++image) {
    for (int64_t token = 0; token < prefix; ++token) {
      const T* from = x.data<T>() + image * x.stride(0) + token * x.stride(1);
      T* to = out.mutable_data<T>() + (image * out.size(1) + token) * channels;
      if (!paper && norm.exists) normalize(from, channels, weight, bias, norm.eps, row.data());
      for (int64_t c = 0; c < channels; ++c) {
        const float branch = paper ? 0.0f : norm.exists ? row[static_cast<size_t>(c)] : value(from + c);
        const int64_t at = residual ? image * residual->stride(0) + token * residual->stride(1) + c : 0;
        store(residual ? value(residual->data<T>() + at) + branch : branch, to + c);
      }
    }
  }
}

void run_convolution(const TokenDepthwiseConv& op, const Tensor&) { run_token_depthwise_conv(op); }

Tensor convolve(Tensor hidden, Depthwise depthwise, const Tokens& tokens) {
  constexpr auto kGelu = static_cast<int64_t>(Activation::gelu);
  const int64_t padding = depthwise.weight.size(3) / 2;
  return token_depthwise_conv_entry<run_convolution>(
      std::move(hidden),
      {std::move(depthwise.weight), std::move(depthwise.bias), std::move(depthwise.pre_norm), kGelu,
       std::move(depthwise.norm), kGelu, tokens.height, tokens.width, 1, padding, tokens.prefix, false});
}

Tensor leff(Tensor x, const NormOfRows& norm, Layer up, Depthwise depthwise, Layer down, const NormArguments& down_norm,
            OptionalTensor residual, const Tokens& tokens, bool paper) {
  check(x.dim() == 3, kOp, ": x must be (B, P + h*w, C), got shape ", shape_of(x));
  const int64_t outputs = down.weight.dim() == 2 ? down.weight.size(0) : 0;
  check(tokens.prefix == 0 || outputs == x.size(2), kOp, ": down_weight must be (", x.size(2),
        ", E), as many channels as x has with prefix tokens, got ", shape_of(down.weight));
  check(depthwise.weight.dim() == 4 && depthwise.weight.size(3) % 2 == 1, kOp,
        ": dw_weight must have an odd kernel, which keeps the grid, got ", shape_of(depthwise.weight));
  Addition none, addition{std::nullopt, std::move(residual)};
  Tensor hidden = linear(kOp, x, up, norm, {}, Activation::none, none);
  hidden = convolve(std::move(hidden), std::move(depthwise), tokens);
  const FoldedNorm behind(kOp, "down_norm_", down_norm, outputs);
  const Activation last = paper ? Activation::gelu : Activation::none;
  Tensor out = linear(kOp, hidden, down, {}, behind.columns(), last, addition);
  if (out.numel() == 0 || tokens.prefix == 0) return out;
  if (x.dtype() == Dtype::bfloat16) {
    put_prefix<Bfloat16>(x, norm, addition.residual, tokens.prefix, paper, out);
  } else if (x.dtype() == Dtype::float16) {
    put_prefix<Float16>(x, norm, addition.residual, tokens.prefix, paper, out);
  } else {
    put_prefix<float>(x, norm, addition.residual, tokens.prefix, paper, out);
  }
  return out;
}

FASTVIT_REGISTER(packed_leff, "CPU", leff);

}  // namespace
}  // namespace fastvit
