// fastvit::packed_conv_batch_norm on the CPU: a product with the windows of the image, which are read where they lie.
#include "linear/op.h"
#include "common/arguments.h"

namespace fastvit {
namespace {

constexpr char kOp[] = "conv_batch_norm";

// The convolution, in the schema's order (fastvit/ops/conv_batch_norm.py).
struct Convolution {
  using Schema = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  bool channels_last;  // whether the weight is (O, k * l * C), and (O, C * k * l) otherwise
};

// How many windows of a side fit; checks that sizes and strides can be computed with.
int64_t windows_along(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  check(kernel >= 1 && stride >= 1 && padding >= 0, kOp, ": kernel and stride must be at least 1, padding 0, got ",
        kernel, ", ", stride, " and ", padding);
  checked_product(kOp, {8, larger(larger(size, kernel), padding)});  // sums of them fit
  check(size + 2 * padding >= kernel, kOp, ": padding: a kernel of ", kernel, " does not fit ", size, " padded by ",
        padding);
  return (size + 2 * padding - kernel) / stride + 1;
}

Windows windows_of(Tensor& x, const Convolution& c) {
  const int64_t channels = x.size(1);
  Windows w{};
  w.height = x.size(2), w.width = x.size(3);
  w.kernel_height = c.kernel_height, w.kernel_width = c.kernel_width;
  w.padding_height = c.padding_height, w.padding_width = c.padding_width;
  w.rows = windows_along(w.height, c.kernel_height, c.stride_height, c.padding_height);
  w.columns = windows_along(w.width, c.kernel_width, c.stride_width, c.padding_width);
  // Beyond, there is one window whatever the stride.
  w.stride_height = smaller(c.stride_height, w.height + 2 * w.padding_height);
  w.stride_width = smaller(c.stride_width, w.width + 2 * w.padding_width);
  checked_product(kOp, {64, w.width + 2 * w.padding_width + w.kernel_width, larger(channels, 1)});
  checked_product(kOp, {64, w.kernel_height, w.kernel_width, larger(channels, 1)});
  if (c.channels_last) {
    check(x.stride(1) == 1 && x.stride(3) == channels, kOp, ": x must be channels-last, as the weight is");
  } else {
    make_last_axis_contiguous(x);
  }
  w.planes = c.channels_last ? 1 : channels;
  w.pixel = c.channels_last ? channels : 1;
  w.map_stride = x.stride(0), w.plane_stride = x.stride(1), w.row_stride = x.stride(2);
  return w;
}

Tensor conv_batch_norm(Tensor x, Layer layer, const Convolution& convolution, const NormArguments& norm,
                       int64_t activation) {
  check(x.is_cpu() && x.dim() == 4, kOp, ": x must be (B, C, H, W) on the CPU, got ", shape_of(x));
  check_cpu_dtype(kOp, x, "x", true);
  const Activation code = activation_of(kOp, activation, "activation");
  const Windows windows = windows_of(x, convolution);
  check(layer.weight.dim() == 2, kOp, ": weight must have two axes, got ", shape_of(layer.weight));
  const FoldedNorm behind(kOp, "norm_", norm, layer.weight.size(0));
  return convolve(kOp, x, layer, windows, behind.columns(), code);
}

FASTVIT_REGISTER(packed_conv_batch_norm, "CPU", conv_batch_norm);

}  // namespace
}  // namespace fastvit
