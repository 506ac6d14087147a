// Runs what export.py packaged, without Python: ./main model.pt2 /path/of/fusedattn/_C.abi3.so
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "expected the package and the library of fusedattn\n";
    return 2;
  }
  // Loading it registers its operators. Lazily: the function that Python imports it by stays unresolved.
  if (dlopen(arguments[2], RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const std::vector<at::Tensor> inputs = {at::linspace(-1, 1, 60).view({2, 5, 6}),
                                          at::linspace(0, 1, 8).view({2, 4})};
  std::cout.precision(9);
  for (const at::Tensor& output : model.run(inputs)) {
    const at::Tensor flat = output.contiguous();
    for (int64_t n = 0; n < flat.numel(); ++n) std::cout << flat.const_data_ptr<float>()[n] << '\n';
  }
}
