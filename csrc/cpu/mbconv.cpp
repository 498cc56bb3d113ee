// Compiled once per instruction set.
#include "mbconv.h"

#include "mbconv_backward.h"
#include "mbconv_forward.h"

namespace pynas {
namespace {

template <typename T>
void forward(const MbForward<T>& args, const Workers& workers) {
  MbForwardPass<T>(args, workers).run();
}

template <typename T>
void backward(const MbBackward<T>& args, const Workers& workers) {
  MbBackwardPass<T>(args, workers).run();
}

}  // namespace

namespace PYNAS_ISA {
const MbTable mbconv = {{forward<float>, backward<float>},
                        {forward<double>, backward<double>},
                        kLanes<float>,
                        kLanes<double>};
}
}  // namespace pynas
