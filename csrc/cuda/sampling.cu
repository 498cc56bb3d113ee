// Gumbel-softmax gates, forward and backward, and paths in bulk: csrc/cpu/gumbel.h and
// csrc/cpu/paths.h on a GPU.
//
// The arithmetic, the order of every sum and the random words are those of the CPU, and nothing is
// fused (--fmad=false), so float32 results are the CPU's bit for bit. A layer is a thread's: all of
// a search space are one launch, which is what a step costs.
#include <cmath>

#include "../shared/float_math.h"
#include "../shared/philox.h"
#include "device.h"

namespace pynas {
namespace {

constexpr int kThreads = 64;
constexpr int kLayersPerBlock = 4;  // that share a Philox block

struct Gates {
  int64_t draws, layers, options;
  const float* theta;   // [layers, options]
  const uint8_t* mask;  // [layers, options]
  const float* cost;    // [layers, options]
  float tau;
  uint64_t seed, step;
};

struct GateResults {
  float* soft;        // [draws, layers, options]
  int64_t* index;     // [draws, layers]
  float* log_prob;    // [draws, layers]
  float* layer_cost;  // [draws, layers]: what each adds to cost
  float* cost;        // [draws]
};

struct GateGradients {
  const float *soft, *log_prob, *cost;  // as the results; null stands for zeros
  float* scratch;                       // [layers, options]
  float* theta_out;                     // [layers, options]
  float* cost_out;                      // [layers, options] or null
};

// The word of a layer. With an index the block would lie in memory.
__device__ __forceinline__ uint32_t word_of(const Block& block, int64_t layer) {
  const int64_t i = layer % kLayersPerBlock;
  return i < 2 ? (i == 0 ? block.word[0] : block.word[1])
               : (i == 2 ? block.word[2] : block.word[3]);
}

// A layer's part of the inputs.
struct Row {
  Array<const float> theta, cost;
  Array<const uint8_t> mask;
};

__device__ __forceinline__ Row row_of(const Gates& in, int64_t layer) {
  const int64_t all = in.layers * in.options, first = layer * in.options;
  return {array(in.theta, all) + first, array(in.cost, all) + first, array(in.mask, all) + first};
}

__device__ __forceinline__ float noise_of(const Gates& in, int64_t draw_index, int64_t layer,
                                          int64_t option) {
  const Block block =
      draw(Domain::kGumbel, in.seed, in.step, static_cast<uint32_t>(draw_index),
           static_cast<uint32_t>(layer / kLayersPerBlock), static_cast<uint32_t>(option));
  return gumbel_f32(word_of(block, layer));
}

// Gates of one layer of one draw, to soft; returns the chosen option.
__device__ inline int64_t draw_gates(const Gates& in, const Row& row, int64_t draw_index,
                                     int64_t layer, Array<float> soft) {
  float top = -INFINITY;
  int64_t best = 0;
  for (int64_t k = 0; k < in.options; ++k) {
    const float noisy = row.mask[k] ? row.theta[k] + noise_of(in, draw_index, layer, k) : -INFINITY;
    soft[k] = noisy;
    best = noisy > top ? k : best;
    top = noisy > top ? noisy : top;
  }
  const float inverse_tau = 1.0f / in.tau;
  float sum = 0.0f;
  for (int64_t k = 0; k < in.options; ++k) {
    soft[k] = exp_f32((soft[k] - top) * inverse_tau);
    sum += soft[k];
  }
  const float scale = 1.0f / sum;
  for (int64_t k = 0; k < in.options; ++k) soft[k] *= scale;
  return best;
}

// Greatest theta of a layer, and the sum of exp(theta - greatest).
__device__ inline float weigh(const Gates& in, const Row& row, float& top) {
  top = -INFINITY;
  for (int64_t k = 0; k < in.options; ++k) {
    top = row.mask[k] && row.theta[k] > top ? row.theta[k] : top;
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < in.options; ++k) {
    sum += exp_f32(row.mask[k] ? row.theta[k] - top : -INFINITY);
  }
  return sum;
}

// Whether a layer has an option, and values of its options are finite.
__device__ inline bool sensible(const Gates& in, const Row& row) {
  bool any = false, finite = true;
  for (int64_t k = 0; k < in.options; ++k) {
    any = any || row.mask[k];
    finite = finite && (!row.mask[k] ||
                        (row.theta[k] - row.theta[k] == 0.0f && row.cost[k] - row.cost[k] == 0.0f));
  }
  return any && finite;
}

__global__ void __launch_bounds__(kThreads) gumbel_forward(Gates in, GateResults out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= in.draws * in.layers) return;
  const int64_t layer = at % in.layers, count = in.draws * in.layers;
  const Row row = row_of(in, layer);
  const auto soft = array(out.soft, count * in.options) + at * in.options;
  const auto index = array(out.index, count);
  const auto log_prob = array(out.log_prob, count), cost = array(out.layer_cost, count);
  if (!sensible(in, row)) {
    for (int64_t k = 0; k < in.options; ++k) soft[k] = NAN;
    index[at] = 0;
    log_prob[at] = NAN;
    cost[at] = NAN;
    return;
  }
  const int64_t best = draw_gates(in, row, at / in.layers, layer, soft);
  float top, total = 0.0f;
  const float sum = weigh(in, row, top);
  for (int64_t k = 0; k < in.options; ++k) total += row.mask[k] ? soft[k] * row.cost[k] : 0.0f;
  index[at] = best;
  log_prob[at] = (row.theta[best] - top) - log_f32(sum);
  cost[at] = total;
}

__global__ void __launch_bounds__(kThreads) gumbel_cost(Gates in, GateResults out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= in.draws) return;
  const auto part = array<const float>(out.layer_cost, in.draws * in.layers) + at * in.layers;
  float total = 0.0f;
  for (int64_t layer = 0; layer < in.layers; ++layer) total += part[layer];
  array(out.cost, in.draws)[at] = total;
}

// What reaches soft of one option: its own gradient and that of the expected cost.
__device__ __forceinline__ float reaches(const Row& row, Array<const float> soft_gradient,
                                         bool has_soft, float cost_gradient, bool has_cost,
                                         int64_t k) {
  const float direct = has_soft ? soft_gradient[k] : 0.0f;
  const float through_cost = has_cost ? cost_gradient * row.cost[k] : 0.0f;
  return row.mask[k] ? direct + through_cost : 0.0f;
}

__global__ void __launch_bounds__(kThreads) gumbel_backward(Gates in, GateGradients g) {
  const int64_t layer = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (layer >= in.layers) return;
  const int64_t all = in.layers * in.options, first = layer * in.options;
  const Row row = row_of(in, layer);
  const auto soft = array(g.scratch, all) + first, theta_out = array(g.theta_out, all) + first;
  const auto cost_out =
      array(g.cost_out, g.cost_out == nullptr ? 0 : all) + (g.cost_out == nullptr ? 0 : first);
  for (int64_t k = 0; k < in.options; ++k) {
    theta_out[k] = 0.0f;
    if (g.cost_out != nullptr) cost_out[k] = 0.0f;
  }
  float top, sum = 0.0f;
  if (g.log_prob != nullptr) sum = weigh(in, row, top);
  const float inverse_tau = 1.0f / in.tau;
  for (int64_t d = 0; d < in.draws; ++d) {
    const int64_t chosen = draw_gates(in, row, d, layer, soft);
    const auto soft_gradient = array(g.soft, g.soft == nullptr ? 0 : in.draws * all) +
                               (g.soft == nullptr ? 0 : (d * in.layers + layer) * in.options);
    const float cost_gradient = g.cost == nullptr ? 0.0f : array(g.cost, in.draws)[d];
    float dot = 0.0f;
    for (int64_t k = 0; k < in.options; ++k) {
      dot += soft[k] *
             reaches(row, soft_gradient, g.soft != nullptr, cost_gradient, g.cost != nullptr, k);
    }
    for (int64_t k = 0; k < in.options; ++k) {
      const float total =
          reaches(row, soft_gradient, g.soft != nullptr, cost_gradient, g.cost != nullptr, k);
      theta_out[k] += soft[k] * (total - dot) * inverse_tau;
      if (g.cost_out != nullptr) cost_out[k] += soft[k] * cost_gradient;
    }
    if (g.log_prob == nullptr) continue;
    const float gradient = array(g.log_prob, in.draws * in.layers)[d * in.layers + layer];
    const float scale = gradient / sum;
    for (int64_t k = 0; k < in.options; ++k) {
      theta_out[k] -= scale * exp_f32(row.mask[k] ? row.theta[k] - top : -INFINITY);
    }
    theta_out[chosen] += gradient;
  }
}

struct Paths {
  int64_t paths, layers, cuts;
  const int64_t* threshold;  // [layers, cuts]
  uint64_t seed, step;
  uint8_t* out;  // [paths, layers]
};

// A thread draws the options of four layers of a path.
__global__ void __launch_bounds__(kThreads) sample_paths(Paths in) {
  const int64_t groups = ceil_div(in.layers, kLayersPerBlock);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= in.paths * groups) return;
  const int64_t path = at / groups, group = at % groups;
  const Block block = draw(Domain::kPaths, in.seed, in.step, static_cast<uint32_t>(path),
                           static_cast<uint32_t>(group), 0);
  const auto threshold = array(in.threshold, in.layers * in.cuts);
  const auto out = array(in.out, in.paths * in.layers);
#pragma unroll
  for (int i = 0; i < kLayersPerBlock; ++i) {
    const int64_t layer = group * kLayersPerBlock + i;
    if (layer >= in.layers) return;
    uint8_t option = 0;
    for (int64_t c = 0; c < in.cuts; ++c) {
      option += static_cast<int64_t>(block.word[i]) >= threshold[layer * in.cuts + c] ? 1 : 0;
    }
    out[path * in.layers + layer] = option;
  }
}

struct Rounds {
  int64_t rounds, layers, most;
  const int64_t* options;  // [layers]
  uint64_t seed, step;
  uint8_t* out;  // [rounds, most, layers]
};

// A thread finds one layer's option of one path of a round: the rank of its word among those of its
// permutation, where equal words keep their order.
__global__ void __launch_bounds__(kThreads) fair_paths(Rounds in) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= in.rounds * in.most * in.layers) return;
  const int64_t layer = at % in.layers, slot = at / in.layers % in.most;
  const int64_t round = at / in.layers / in.most;
  const int64_t options = array(in.options, in.layers)[layer], start = slot - slot % options;
  const auto word = [&](int64_t item) {
    return word_of(
        draw(Domain::kFair, in.seed, in.step, static_cast<uint32_t>(round),
             static_cast<uint32_t>(layer / kLayersPerBlock), static_cast<uint32_t>(item)),
        layer);
  };
  const uint32_t own = word(slot);
  uint8_t rank = 0;
  for (int64_t other = start; other < start + options; ++other) {
    if (other == slot) continue;
    const uint32_t found = word(other);
    rank += found < own || (found == own && other < slot) ? 1 : 0;
  }
  array(in.out, in.rounds * in.most * in.layers)[at] = rank;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

}  // namespace
}  // namespace pynas

PYNAS_EXPORT const char* pynas_gumbel_forward(const pynas::Gates* in, const pynas::GateResults* out,
                                              void* stream) {
  pynas::Launches run;
  run(pynas::gumbel_forward, dim3(pynas::blocks_for(in->draws * in->layers)), pynas::kThreads, 0,
      stream, *in, *out);
  run(pynas::gumbel_cost, dim3(pynas::blocks_for(in->draws)), pynas::kThreads, 0, stream, *in,
      *out);
  return run.failure;
}

PYNAS_EXPORT const char* pynas_gumbel_backward(const pynas::Gates* in,
                                               const pynas::GateGradients* gradients,
                                               void* stream) {
  pynas::Launches run;
  run(pynas::gumbel_backward, dim3(pynas::blocks_for(in->layers)), pynas::kThreads, 0, stream, *in,
      *gradients);
  return run.failure;
}

PYNAS_EXPORT const char* pynas_sample_paths(const pynas::Paths* in, void* stream) {
  pynas::Launches run;
  const int64_t groups = pynas::ceil_div(in->layers, pynas::kLayersPerBlock);
  run(pynas::sample_paths, dim3(pynas::blocks_for(in->paths * groups)), pynas::kThreads, 0, stream,
      *in);
  return run.failure;
}

PYNAS_EXPORT const char* pynas_fair_paths(const pynas::Rounds* in, void* stream) {
  pynas::Launches run;
  run(pynas::fair_paths, dim3(pynas::blocks_for(in->rounds * in->most * in->layers)),
      pynas::kThreads, 0, stream, *in);
  return run.failure;
}
