#include "common/arguments.h"

#include <algorithm>

#include "common/bfloat16.h"
#include "common/float16.h"

namespace fastvit {

void check_cpu_shape(const char* op, const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  check(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  const auto axes = static_cast<int64_t>(expected.size());
  if (tensor.dim() == axes && std::equal(expected.begin(), expected.end(), tensor.sizes())) return;
  check(false, op, ": ", name, " has shape ", shape_of(tensor), ", expected ", shape_of(expected.begin(), axes));
}

void check_cpu_dtype(const char* op, const Tensor& tensor, const char* name, bool or_float16) {
  const Dtype dtype = tensor.dtype();
  check(dtype == Dtype::float32 || dtype == Dtype::bfloat16 || (or_float16 && dtype == Dtype::float16), op, ": ", name,
        " must be float32", or_float16 ? ", bfloat16 or float16" : " or bfloat16", " on the CPU, got ", dtype);
}

Element element_of(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? Element::bfloat16 : dtype == Dtype::float16 ? Element::float16 : Element::float32;
}

Dtype dtype_of(Element element) {
  return element == Element::bfloat16 ? Dtype::bfloat16 : element == Element::float16 ? Dtype::float16 : Dtype::float32;
}

std::vector<float> small_values(const char* op, const Tensor& tensor, const char* name) {
  check_cpu_dtype(op, tensor, name, true);
  const bool matrix = tensor.dim() == 2;
  const Element element = element_of(tensor.dtype());
  const int64_t rows = matrix ? tensor.size(0) : 1, columns = tensor.size(matrix ? 1 : 0);
  const int64_t row_stride = matrix ? tensor.stride(0) : 0, column_stride = tensor.stride(matrix ? 1 : 0);
  const void* data = tensor.data<void>();
  std::vector<float> values;
  values.reserve(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = i * row_stride + j * column_stride;
      if (element == Element::float32) {
        values.push_back(static_cast<const float*>(data)[at]);
      } else {
        const uint16_t bits = static_cast<const uint16_t*>(data)[at];
        values.push_back(element == Element::bfloat16 ? float_of_bfloat16(bits) : float_of_float16(bits));
      }
    }
  }
  return values;
}

Activation activation_of(const char* op, int64_t code, const char* name, Activation last) {
  check(code >= 0 && code <= static_cast<int64_t>(last), op, ": ", name, " must be a code from 0 to ",
        static_cast<int64_t>(last), ", got ", code);
  return static_cast<Activation>(code);
}

}  // namespace fastvit
