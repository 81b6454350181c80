// What conv_projection computes, as plain data for kernels on every device.
#pragma once

#include <array>

#include "token_depthwise_conv/args.h"

namespace fastvit {

// The depthwise convolutions of q, k and v, of one x, each with its norm.
using Projections = std::array<TokenDepthwiseConv, 3>;

}  // namespace fastvit
