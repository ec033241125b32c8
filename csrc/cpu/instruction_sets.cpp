#include <string.h>

#include "kernels.h"

namespace saemnesia_fast {
namespace {

#if defined(__x86_64__)
const bool kHasAvx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512vnni", kHasAvx512 && __builtin_cpu_supports("avx512vnni"), &avx512::kSingle, &avx512::kDouble,
     &avx512vnni::kScreen},
    {"avx512", kHasAvx512, &avx512::kSingle, &avx512::kDouble, nullptr},
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kSingle, &avx2::kDouble, nullptr},
#endif
    {"baseline", true, &baseline::kSingle, &baseline::kDouble, nullptr},
};

const InstructionSet* widest() {
  const InstructionSet* set = kSets;
  while (!set->available) {
    ++set;
  }
  return set;
}

const InstructionSet* current = widest();

}  // namespace

const InstructionSet* instruction_sets() { return kSets; }

const InstructionSet& current_instruction_set() { return *current; }

bool use_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (set.available && strcmp(set.name, name) == 0) {
      current = &set;
      return true;
    }
  }
  return false;
}

template <>
const Kernels<float>& kernels() {
  return *current->single;
}

template <>
const Kernels<double>& kernels() {
  return *current->twice;
}

const ScreenKernels* screen_kernels() { return current->screen; }

}  // namespace saemnesia_fast
