// Checks of arguments that several operators share. Messages begin with `op`, the operator that was called.
#pragma once

#include <initializer_list>
#include <vector>

#include "common/activation.h"
#include "common/torch_abi.h"

namespace fastvit {

void check_cpu_shape(const char* op, const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected);

// float32 or bfloat16: what the CPU kernels compute in.
void check_cpu_dtype(const char* op, const Tensor& tensor, const char* name);

// The values of a small tensor of one or two axes, row by row.
std::vector<float> small_values(const char* op, const Tensor& tensor, const char* name);

Activation activation_of(const char* op, int64_t code, const char* name, Activation last = Activation::relu);

}  // namespace fastvit
