// Compiled once per instruction set.
#include "patches.h"

#include "patches_backward.h"
#include "patches_forward.h"

namespace pynas {
namespace {

template <typename T>
void forward(const PatchForward<T>& args, const Workers& workers) {
  PatchForwardPass<T>(args, workers).run();
}

template <typename T>
void backward(const PatchBackward<T>& args, const Workers& workers) {
  PatchBackwardPass<T>(args, workers).run();
}

}  // namespace

namespace PYNAS_ISA {
const PatchTable patches = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};
}
}  // namespace pynas
