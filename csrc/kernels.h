// All kernels of one instruction set, as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "cpu/edge.h"
#include "cpu/elementwise.h"
#include "cpu/gumbel.h"
#include "cpu/mbconv.h"
#include "cpu/mbconv_infer.h"
#include "cpu/patches.h"
#include "cpu/paths.h"
#include "isa.h"

namespace pynas {

struct Kernels {
  explicit Kernels(const std::string& name) : isa(isa_named(name)) {}

  Isa isa;
  const ElementwiseTable& elementwise = PYNAS_TABLE(isa, elementwise);
  const GumbelTable& gumbel = PYNAS_TABLE(isa, gumbel);
  const PathTable& paths = PYNAS_TABLE(isa, paths);
  const MbTable& mbconv = PYNAS_TABLE(isa, mbconv);
  const MbInferTable& mbconv_infer = PYNAS_TABLE(isa, mbconv_infer);
  const EdgeTable& edge = PYNAS_TABLE(isa, edge);
  const PatchTable& patches = PYNAS_TABLE(isa, patches);

  // For a layer of so many channels. Where half as long vectors compute as much per cycle, they are
  // taken for channels that would fill the long ones badly.
  const MbTable& mbconv_for(int64_t in_channels, int64_t out_channels) const;
};

// Lets other Python threads run, where the work outweighs the switch.
class LongWork {
 public:
  explicit LongWork(int64_t elements) {
    if (elements > 10000) release_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> release_;
};

void bind_mbconv(pybind11::class_<Kernels>& kernels);
void bind_mbconv_infer(pybind11::class_<Kernels>& kernels);
void bind_edge(pybind11::class_<Kernels>& kernels);
void bind_patches(pybind11::class_<Kernels>& kernels);

}  // namespace pynas
