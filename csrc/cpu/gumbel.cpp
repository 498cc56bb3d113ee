// Compiled once per instruction set. Sums run over the options in order and nothing is fused, so
// float32 results are equal bit for bit on all of them. No standard containers or algorithms: their
// inline symbols would be shared between the copies.
#include "gumbel.h"

#include <cmath>

#include "../shared/float_math.h"
#include "../shared/philox.h"

namespace pynas {
namespace {

constexpr int64_t kLayersPerBlock = 4;
constexpr int64_t kScratch = kLayersPerBlock * kMostOptions;

inline float exponential(float x) { return exp_f32(x); }
inline double exponential(double x) { return ::exp(x); }
inline float logarithm(float x) { return log_f32(x); }
inline double logarithm(double x) { return ::log(x); }

template <typename T>
inline bool finite(T x) {
  return x - x == T{0};
}

template <typename T>
bool sensible(const GumbelInputs<T>& in, int64_t layer) {
  bool any = false, all_finite = true;
  for (int64_t k = layer * in.options; k < (layer + 1) * in.options; ++k) {
    any = any || in.mask[k];
    all_finite = all_finite && (!in.mask[k] || (finite(in.theta[k]) && finite(in.cost[k])));
  }
  return any && all_finite;
}

template <typename T>
void exponentiate(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = exponential(x[i]);
}

// A run of layers small enough for the scratch, with what all draws share.
template <typename T>
struct Run {
  int64_t first, count;
  const T* theta;
  const T* cost;
  const uint8_t* mask;
  T weight[kScratch];                                // exp(theta - top), 0 where masked
  T top[kScratch], sum[kScratch];                    // greatest theta; sum of weight
  uint32_t group[kMostOptions], item[kMostOptions];  // places of the Philox blocks
  // The noise of layer first + 4 * g + i, option k lies at noise[i][g * options + k].
  float noise[kLayersPerBlock][kMostOptions];
};

template <typename T>
void weigh(Run<T>& run, int64_t options) {
  for (int64_t row = 0; row < run.count; ++row) {
    const T* theta = run.theta + row * options;
    const uint8_t* mask = run.mask + row * options;
    T top = -INFINITY;
    for (int64_t k = 0; k < options; ++k) top = mask[k] && theta[k] > top ? theta[k] : top;
    for (int64_t k = 0; k < options; ++k) {
      run.weight[row * options + k] = mask[k] ? theta[k] - top : T(-INFINITY);
    }
    run.top[row] = top;
  }
  exponentiate(run.weight, run.count * options);
  for (int64_t row = 0; row < run.count; ++row) {
    T sum = 0;
    for (int64_t k = 0; k < options; ++k) sum += run.weight[row * options + k];
    run.sum[row] = sum;
  }
}

// Moves to the run that starts at layer `first`; false behind the last layer.
template <typename T>
bool start(const GumbelInputs<T>& in, int64_t first, bool weights, Run<T>& run) {
  if (first >= in.layers) return false;
  const int64_t most = kLayersPerBlock * (kMostOptions / in.options), left = in.layers - first;
  run.first = first;
  run.count = left < most ? left : most;
  run.theta = in.theta + first * in.options;
  run.cost = in.cost + first * in.options;
  run.mask = in.mask + first * in.options;
  int64_t lane = 0;
  for (int64_t row = 0; row < run.count; row += kLayersPerBlock) {
    for (int64_t k = 0; k < in.options; ++k, ++lane) {
      run.group[lane] = static_cast<uint32_t>((first + row) / kLayersPerBlock);
      run.item[lane] = static_cast<uint32_t>(k);
    }
  }
  if (weights) weigh(run, in.options);
  return true;
}

template <typename T>
void draw_noise(const GumbelInputs<T>& in, int64_t index, Run<T>& run) {
  const int64_t lanes = (run.count + kLayersPerBlock - 1) / kLayersPerBlock * in.options;
  for (int64_t i = 0; i < lanes; ++i) {
    const Block block = draw(Domain::kGumbel, in.seed, in.step, static_cast<uint32_t>(index),
                             run.group[i], run.item[i]);
    run.noise[0][i] = gumbel_f32(block.word[0]);
    run.noise[1][i] = gumbel_f32(block.word[1]);
    run.noise[2][i] = gumbel_f32(block.word[2]);
    run.noise[3][i] = gumbel_f32(block.word[3]);
  }
}

// Draws the gates of a run: soft [count, O] and index [count].
template <typename T>
void draw_gates(const GumbelInputs<T>& in, int64_t draw, Run<T>& run, T* soft, int64_t* index) {
  draw_noise(in, draw, run);
  const int64_t options = in.options;
  const T inverse_tau = T{1} / static_cast<T>(in.tau);
  for (int64_t row = 0; row < run.count; ++row) {
    const T* theta = run.theta + row * options;
    const uint8_t* mask = run.mask + row * options;
    const float* noise = run.noise[row % kLayersPerBlock] + row / kLayersPerBlock * options;
    T* gate = soft + row * options;
    T top = -INFINITY;
    int64_t best = 0;
    for (int64_t k = 0; k < options; ++k) {
      gate[k] = mask[k] ? theta[k] + static_cast<T>(noise[k]) : T(-INFINITY);
      best = gate[k] > top ? k : best;
      top = gate[k] > top ? gate[k] : top;
    }
    for (int64_t k = 0; k < options; ++k) gate[k] = (gate[k] - top) * inverse_tau;
    index[row] = best;
  }
  exponentiate(soft, run.count * options);
  for (int64_t row = 0; row < run.count; ++row) {
    T* gate = soft + row * options;
    T sum = 0;
    for (int64_t k = 0; k < options; ++k) sum += gate[k];
    const T scale = T{1} / sum;
    for (int64_t k = 0; k < options; ++k) gate[k] *= scale;
  }
}

template <typename T>
T expected_cost(const Run<T>& run, int64_t row, int64_t options, const T* soft) {
  const T* cost = run.cost + row * options;
  const uint8_t* mask = run.mask + row * options;
  T sum = 0;
  for (int64_t k = 0; k < options; ++k) sum += mask[k] ? soft[row * options + k] * cost[k] : T{0};
  return sum;
}

template <typename T>
bool forward(const GumbelInputs<T>& in, const GumbelOutputs<T>& out) {
  for (int64_t layer = 0; layer < in.layers; ++layer) {
    if (!sensible(in, layer)) return false;
  }
  for (int64_t d = 0; d < in.draws; ++d) out.cost[d] = 0;
  Run<T> run;
  T log_sum[kScratch];
  for (int64_t first = 0; start(in, first, true, run); first += run.count) {
    for (int64_t row = 0; row < run.count; ++row) log_sum[row] = logarithm(run.sum[row]);
    for (int64_t d = 0; d < in.draws; ++d) {
      const int64_t layer = d * in.layers + first;
      T* soft = out.soft + layer * in.options;
      draw_gates(in, d, run, soft, out.index + layer);
      for (int64_t row = 0; row < run.count; ++row) {
        const T chosen = run.theta[row * in.options + out.index[layer + row]];
        out.log_prob[layer + row] = (chosen - run.top[row]) - log_sum[row];
        out.cost[d] += expected_cost(run, row, in.options, soft);
      }
    }
  }
  return true;
}

// Adds the gradients that reach one layer of one draw through soft and the expected cost:
// d soft_i / d theta_k = soft_i (delta_ik - soft_k) / tau.
template <typename T>
void add_soft(const GumbelInputs<T>& in, const GumbelGradients<T>& g, const Run<T>& run,
              int64_t draw, int64_t row, const T* soft) {
  const int64_t options = in.options, layer = run.first + row;
  const T* soft_grad = g.soft ? g.soft + (draw * in.layers + layer) * options : nullptr;
  const T* cost = run.cost + row * options;
  const uint8_t* mask = run.mask + row * options;
  const T cost_grad = g.cost ? g.cost[draw] : T{0};
  const T inverse_tau = T{1} / static_cast<T>(in.tau);
  T total[kMostOptions], dot = 0;
  for (int64_t k = 0; k < options; ++k) {
    const T direct = soft_grad ? soft_grad[k] : T{0};
    const T through_cost = g.cost ? cost_grad * cost[k] : T{0};
    total[k] = mask[k] ? direct + through_cost : T{0};
    dot += soft[k] * total[k];
  }
  T* theta_out = g.theta_out + layer * options;
  for (int64_t k = 0; k < options; ++k) theta_out[k] += soft[k] * (total[k] - dot) * inverse_tau;
  if (!g.cost_out) return;
  T* cost_out = g.cost_out + layer * options;
  for (int64_t k = 0; k < options; ++k) cost_out[k] += soft[k] * cost_grad;
}

// Adds those through log_prob: d log p_chosen / d theta_k = delta - p_k.
template <typename T>
void add_log_prob(const GumbelInputs<T>& in, const GumbelGradients<T>& g, const Run<T>& run,
                  int64_t draw, int64_t row, int64_t chosen) {
  const int64_t layer = run.first + row;
  const T grad = g.log_prob[draw * in.layers + layer], scale = grad / run.sum[row];
  T* theta_out = g.theta_out + layer * in.options;
  for (int64_t k = 0; k < in.options; ++k) {
    theta_out[k] -= scale * run.weight[row * in.options + k];
  }
  theta_out[chosen] += grad;
}

template <typename T>
void backward(const GumbelInputs<T>& in, const GumbelGradients<T>& g) {
  for (int64_t i = 0; i < in.layers * in.options; ++i) g.theta_out[i] = 0;
  for (int64_t i = 0; g.cost_out && i < in.layers * in.options; ++i) g.cost_out[i] = 0;
  Run<T> run;
  T soft[kScratch];
  int64_t index[kScratch];
  for (int64_t first = 0; start(in, first, g.log_prob != nullptr, run); first += run.count) {
    for (int64_t d = 0; d < in.draws; ++d) {
      draw_gates(in, d, run, soft, index);
      for (int64_t row = 0; row < run.count; ++row) {
        add_soft(in, g, run, d, row, soft + row * in.options);
        if (g.log_prob) add_log_prob(in, g, run, d, row, index[row]);
      }
    }
  }
}

}  // namespace

namespace PYNAS_ISA {
const GumbelTable gumbel = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};
}
}  // namespace pynas
