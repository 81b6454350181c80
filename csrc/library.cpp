// libfastvit.so: the operators of inference on the CPU for a process without Python, such as a C++ program that runs a
// model compiled by AOTInductor. Loading the library registers them with torch. In Python the operators are those that
// fastvit/ops defines, and this library is not needed.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/torch_abi.h"
#include "linear/op.h"

namespace fastvit {
namespace {

// In Python a packed copy is kept for as long as its weight stays as it is. Here AOTInductor keeps it, where it folds
// constants at run time.
FASTVIT_REGISTER(pack_constant, "CPU", pack_weight);

// --- Schemas, as fastvit/ops defines them, which a test compares -----------------------------------------------------

std::string layer(const std::string& name) {
  return "Tensor " + name + "weight, Tensor? " + name + "bias, Tensor? " + name + "packed";
}

std::string layer_norm(const std::string& name) {
  return "bool has_" + name + ", Tensor? " + name + "_weight, Tensor? " + name + "_bias, float " + name + "_eps";
}

std::string batch_norm(const std::string& name) {
  const std::string statistics = "Tensor? " + name + "_mean, Tensor? " + name + "_var";
  return "Tensor? " + name + "_weight, Tensor? " + name + "_bias, " + statistics + ", float " + name + "_eps";
}

std::string convolution(const std::string& name) {
  const std::string tensors = "Tensor " + name + "_weight, Tensor? " + name + "_bias";
  return tensors + ", " + batch_norm(name + "_norm") + ", int " + name + "_stride, int " + name + "_padding";
}

struct Operator {
  std::string name;
  std::vector<std::string> arguments;  // one or several each
  std::string results = "Tensor";

  std::string schema() const {
    std::string text;
    for (const std::string& some : arguments) text += (text.empty() ? "" : ", ") + some;
    return name + "(" + text + ") -> " + results;
  }
};

std::vector<Operator> operators() {
  const std::string heads = "Tensor q, Tensor k, Tensor v", behind = "int activation, Tensor? scale, Tensor? residual";
  const std::string grid = "SymInt height, SymInt width", tokens = grid + ", int prefix_tokens";
  return {
      {"masked_attention_cpp", {heads, "Tensor? mask, Tensor? bias, float scale"}},
      {"head_mixed_attention",
       {heads, "Tensor? pre_weight, Tensor? pre_bias, Tensor? post_weight, Tensor? post_bias",
        "Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float norm_eps",
        "bool layer_norm, float output_scale, bool centred, Tensor? mask, float scale"}},
      {"token_depthwise_conv",
       {"Tensor x, Tensor weight, Tensor? bias", batch_norm("pre_norm"), "int pre_activation", batch_norm("norm"),
        "int activation", grid, "int stride, int padding, int prefix_tokens, bool residual"}},
      {"conv_projection",
       {"Tensor x", convolution("q"), convolution("k"), convolution("v"), tokens},
       "(Tensor, Tensor, Tensor)"},
      {"pack_constant", {"Tensor weight"}},
      {"packed_linear", {"Tensor x", layer(""), layer_norm("norm"), behind}},
      {"packed_mlp", {"Tensor x", layer("fc1_"), layer("fc2_"), layer_norm("norm"), behind}},
      {"packed_glu_mlp",
       {"Tensor x", layer("gate_"), layer("value_"), layer("fc2_"), layer_norm("norm"), layer_norm("hidden_norm"),
        behind}},
      {"packed_leff",
       {"Tensor x", layer_norm("norm"), layer("up_"), "Tensor dw_weight, Tensor? dw_bias", batch_norm("up_norm"),
        batch_norm("dw_norm"), layer("down_"), batch_norm("down_norm"), "Tensor? residual", tokens, "bool paper"}},
      {"packed_conv_batch_norm",
       {"Tensor x", layer(""), "int kernel_height, int kernel_width, int stride_height, int stride_width",
        "int padding_height, int padding_width, bool channels_last", batch_norm("norm"), "int activation"}},
  };
}

// --- Registration ----------------------------------------------------------------------------------------------------

const Registration& registration_of(const std::string& op) {
  for (const auto* entry = registrations(); entry != nullptr; entry = entry->next) {
    if (op == entry->op && std::string("CPU") == entry->key) return *entry;
  }
  throw std::logic_error("fastvit: no kernel for " + op);
}

bool register_for_inference() {
  try {
    cpu_isa();  // a wrong FASTVIT_CPU_CAPABILITY is told here, not in the middle of a model
    for (const Operator& each : operators()) {
      const Registration& registration = registration_of(each.name);
      define_operator(each.schema());
      register_operator(registration);
    }
    return true;
  } catch (const std::exception& error) {  // which cannot leave dlopen
    std::fprintf(stderr, "libfastvit: no operators were registered: %s\n", error.what());
    return false;
  }
}

// Made when the library is loaded, behind every Registration, since setup.py links this file last.
[[maybe_unused]] const bool registered = register_for_inference();

}  // namespace
}  // namespace fastvit
