// Runs a model that AOTInductor compiled, in a process without Python:
//     deploy libfastvit.so model.pt2 images.pt logits.pt
// images.pt holds a tensor, as torch.save writes it, and so will logits.pt. docs/deployment.md shows how to compile it.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int count, char** arguments) {
  if (count != 5) {
    std::cerr << "usage: " << arguments[0] << " libfastvit.so model.pt2 images.pt logits.pt\n";
    return 2;
  }
  // Before the model, which looks its operators up where it is loaded.
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  std::ifstream input(arguments[3], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(input), {}};
  const at::Tensor images = torch::jit::pickle_load(bytes).toTensor();
  const at::Tensor logits = model.run({images}).at(0);
  const std::vector<char> written = torch::jit::pickle_save(logits);
  std::ofstream(arguments[4], std::ios::binary).write(written.data(), static_cast<std::streamsize>(written.size()));
  return 0;
}
