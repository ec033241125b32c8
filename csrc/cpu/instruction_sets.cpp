#include <string.h>

#include "kernels.h"

namespace saemnesia_fast {
namespace {

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl"),
     &avx512::kSingle, &avx512::kDouble},
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kSingle, &avx2::kDouble},
#endif
    {"baseline", true, &baseline::kSingle, &baseline::kDouble},
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

}  // namespace saemnesia_fast
