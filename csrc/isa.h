// The instruction sets that the CPU kernels are compiled for.
#pragma once

#include <string>
#include <vector>

namespace pynas {

enum class Isa { kBase, kAvx2, kAvx512 };

// The instruction sets that were built and that this CPU runs, slowest first.
std::vector<Isa> usable_isas();

std::string name_of(Isa isa);

// The instruction set of that name; the fastest usable one for "". Throws std::invalid_argument for
// any other name.
Isa isa_named(const std::string& name);

// Declares a stem's table of functions for every instruction set. Each CPU file defines the one of
// PYNAS_ISA.
#ifdef PYNAS_X86
#define PYNAS_DECLARE_TABLE(Table, name) \
  namespace base {                       \
  extern const Table name;               \
  }                                      \
  namespace avx2 {                       \
  extern const Table name;               \
  }                                      \
  namespace avx512 {                     \
  extern const Table name;               \
  }
#define PYNAS_TABLE(isa, name) \
  ((isa) == Isa::kAvx512 ? avx512::name : (isa) == Isa::kAvx2 ? avx2::name : base::name)
#else
#define PYNAS_DECLARE_TABLE(Table, name) \
  namespace base {                       \
  extern const Table name;               \
  }
#define PYNAS_TABLE(isa, name) (base::name)
#endif

}  // namespace pynas
