// Operators called one after the other, as a module called them before: at inference, without Python between them; and
// samples of the weights that they read packed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common/torch_abi.h"

namespace fastvit {

// 64 values spread over a matrix in memory, which tell most of its changes; strides in elements.
class Sample {
 public:
  Sample(const void* address, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
         int64_t element_bytes);
  void prefetch() const;
  uint64_t hash() const;

 private:
  static constexpr uint64_t kValues = 64, kPrime = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio, which spreads them
  size_t bytes_;
  std::vector<const char*> values_;
};

// Tensors are counted: 0 is the input, -1 - i the i-th that is held, i + 1 the i-th result of the steps.
class Program {
 public:
  // What can be told of a tensor without its values.
  struct Layout {
    explicit Layout(const Tensor& tensor);
    bool is_of(const Tensor& tensor) const;

   private:
    const void* address;
    Dtype dtype;
    std::vector<int64_t> sizes, strides;
  };

  using Words = std::vector<StableIValue>;
  using Lists = std::vector<std::pair<int64_t, std::vector<int64_t>>>;  // by the place of the argument
  struct Argument {
    int64_t place, index;
    bool optional;
  };
  using Tensors = std::vector<Argument>;

  static std::shared_ptr<Program> make();  // listed
  ~Program();
  int64_t id() const { return id_; }
  static std::shared_ptr<Program> of(int64_t id);  // throws where there is none

  // Holds the tensors and packed weights from here on; the layout of a `fixed` one must stay what it is.
  void hold(Tensor tensor, bool fixed);
  // A held matrix, or contiguous tensor, whose values are to stay as they are, as far as a sample tells.
  void watch(int64_t index);

  // A result that is a view of another tensor, `offset` elements behind its first.
  void add_view(int64_t source, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset);
  // A call of `name`: of ours by its kernel, of others by torch's dispatcher, but for "add" and "addmm" without
  // factors, and "cat" of two tensors along an axis. `words` has the arguments but for tensors and lists; all results
  // are Tensors.
  void add_call(const std::string& name, const std::string& overload, Words words, Lists lists, Tensors tensors,
                int64_t results);
  void finish(int64_t result);

  // Whether the tensors held are as they were when they came.
  bool holds() const;
  Tensor run(Tensor x) const;

 private:
  struct View {
    int64_t source, offset;
    std::vector<int64_t> sizes, strides;
  };
  struct Call {
    BoxedKernel kernel;  // null: by torch's dispatcher
    std::string name, overload;
    int64_t arguments;
    Words words;  // of the stack, whose first are the arguments
    Lists lists;
    Tensors tensors;
    int64_t results;
  };
  struct Step {
    std::variant<View, Call> what;
    std::vector<int64_t> last_read;  // tensors that no later step reads
  };

  Program() = default;

  int64_t id_ = 0, results_ = 0, result_ = 0;
  std::vector<Tensor> held_;
  std::vector<std::pair<size_t, Layout>> fixed_;
  std::vector<std::pair<Sample, uint64_t>> watched_;  // with their hash
  std::vector<Step> steps_;
};

}  // namespace fastvit
