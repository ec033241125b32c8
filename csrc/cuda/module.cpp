// saemnesia_fast._C_cuda: what was built. Loading it registers the ops of csrc/cuda.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

#undef errno  // a flag names it
#define STRING_OF(...) #__VA_ARGS__
#define STRING(...) STRING_OF(__VA_ARGS__)

PYBIND11_MODULE(_C_cuda, m) {
  m.def("build_config", [] {
    py::dict config;
    config["cuda"] = py::str("{}.{}").format(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    config["architectures"] = STRING(SAEMNESIA_FAST_ARCHITECTURES);
    config["flags"] = STRING(SAEMNESIA_FAST_FLAGS);
    return config;
  });
}
