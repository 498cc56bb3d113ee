// The instruction sets that the CPU kernels are compiled for. No standard headers here: every CPU
// file includes this one, and must not emit inline symbols that its copies would share.
#pragma once

namespace pynas {

enum class Isa { kBase, kAvx2, kAvx512 };

// PYNAS_DECLARE_TABLE declares a stem's table of functions once for every instruction set; the CPU
// file defines the one in namespace PYNAS_ISA. PYNAS_TABLE picks one of them.
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
