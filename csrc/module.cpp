// saemnesia_fast._C: what was built and which instruction set runs. Loading it registers the ops of csrc/cpu.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

namespace py = pybind11;
namespace sf = saemnesia_fast;

#undef errno  // a flag names it
#define STRING_OF(...) #__VA_ARGS__
#define STRING(...) STRING_OF(__VA_ARGS__)

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

PYBIND11_MODULE(_C, m) {
  m.def("build_config", [] {
    py::dict config;
    config["compiler"] = kCompiler;
    config["flags"] = STRING(SAEMNESIA_FAST_FLAGS);
    py::list compiled;
    for (int i = 0; i < sf::kNumInstructionSets; ++i) {
      compiled.append(sf::instruction_sets()[i].name);
    }
    config["instruction_sets"] = compiled;
    config["instruction_set"] = sf::current_instruction_set().name;
    return config;
  });
  m.def("use_instruction_set", [](const std::string& name) {
    if (!sf::use_instruction_set(name.c_str())) {
      throw py::value_error("name: expected an instruction set of this build and this machine, got '" + name + "'");
    }
  });
}
