// Checks of arguments that several operators share. Messages begin with `op`, the operator that was called.
#pragma once

#include <initializer_list>
#include <vector>

#include "common/activation.h"
#include "common/element.h"
#include "common/torch_abi.h"

namespace fastvit {

void check_cpu_shape(const char* op, const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected);

// A norm with given statistics, in the order of the schemas.
struct NormArguments {
  using Schema = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, double>;
  OptionalTensor weight, bias, mean, var;
  double eps;

  void make_parameters(const Tensor& x) {
    for (OptionalTensor* tensor : {&weight, &bias, &mean, &var}) make_parameter(*tensor, x);
  }
};

// float32 or bfloat16: what the CPU kernels compute in; some of them float16, too.
void check_cpu_dtype(const char* op, const Tensor& tensor, const char* name, bool or_float16 = false);

// Of a tensor that passed check_cpu_dtype.
Element element_of(Dtype dtype);
Dtype dtype_of(Element element);

// The values of a small tensor of one or two axes, row by row.
std::vector<float> small_values(const char* op, const Tensor& tensor, const char* name);

Activation activation_of(const char* op, int64_t code, const char* name, Activation last = Activation::gelu_tanh);

}  // namespace fastvit
