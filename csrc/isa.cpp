#include "isa.h"

#ifdef PYNAS_X86
#include <cpuid.h>
#endif

#include <stdexcept>

namespace pynas {

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas = {Isa::kBase};
#ifdef PYNAS_X86
  // Exactly the flags that CMakeLists.txt compiles with.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) isas.push_back(Isa::kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back(Isa::kAvx512);
  }
#endif
  return isas;
}

bool narrow_vectors_keep_up() {
#ifdef PYNAS_X86
  // AMD's family 25 (Zen 4) runs a vector of 64 bytes as two halves.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return ((a >> 8) & 15) == 15 && ((a >> 20) & 255) == 10;
#else
  return false;
#endif
}

std::string name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    default:
      return "base";
  }
}

Isa isa_named(const std::string& name) {
  const std::vector<Isa> isas = usable_isas();
  if (name.empty()) return isas.back();
  std::string allowed;
  for (const Isa isa : isas) {
    if (name_of(isa) == name) return isa;
    allowed += (allowed.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::invalid_argument("Instruction set '" + name +
                              "' is not usable here. This CPU and build allow: " + allowed +
                              ". Unset PYNAS_ISA to take the fastest.");
}

}  // namespace pynas
