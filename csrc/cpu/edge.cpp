// Compiled once per instruction set.
#include "edge.h"

#include "edge_backward.h"
#include "edge_forward.h"

namespace pynas {
namespace {

template <typename T>
void forward(const EdgeForward<T>& args, const Workers& workers) {
  EdgeForwardPass<T>(args, workers).run();
}

template <typename T>
void backward(const EdgeBackward<T>& args, const Workers& workers) {
  EdgeBackwardPass<T>(args, workers).run();
}

}  // namespace

namespace PYNAS_ISA {
const EdgeTable edge = {{forward<float>, backward<float>},
                        {forward<double>, backward<double>},
                        kLanes<float>,
                        kLanes<double>};
}
}  // namespace pynas
