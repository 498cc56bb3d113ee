// Launches the passes of mbconv.h. Every function returns null or what went wrong.
#include "mbconv.h"
#include "mbconv_input.h"

namespace pynas {
namespace {

constexpr int64_t kBlocks = 4096;  // of threads, that fill a GPU several times over
constexpr int kMostRows = 512, kMostSlices = 64;

int64_t between(int64_t value, int64_t least, int64_t most) {
  if (value > most) value = most;
  return value < least ? least : value;
}

// Hands out parts of the workspace, or counts what they need where there is none.
class Parts {
 public:
  explicit Parts(float* start) : start_(start) {}

  float* take(int64_t count) {
    float* found = start_ == nullptr ? nullptr : start_ + used_;
    used_ += ceil_div(count, 4) * 4;
    return found;
  }
  int64_t used() const { return used_; }

 private:
  float* start_;
  int64_t used_ = 0;
};

unsigned blocks_for(int64_t work, int64_t each) {
  return static_cast<unsigned>(ceil_div(work, each));
}

// What shares of the positions many blocks take, so that with `others` times as many blocks there
// are enough.
int rows_for(const Layer& layer, int64_t tiles, int64_t others) {
  const int64_t most = layer.most_rows > 0 ? layer.most_rows : kMostRows;
  return static_cast<int>(
      between(kBlocks / (others > 0 ? others : 1), 1, tiles < most ? tiles : most));
}

int64_t tiles_of(int64_t images, int height, int width) {
  return images * ceil_div(height, kSide) * ceil_div(width, kSide);
}

int expand_rows(const Layer& layer, bool trained) {
  return rows_for(layer, tiles_of(layer.images, layer.out_height, layer.out_width),
                  chunks_of(layer, Channels::kHidden, {trained}));
}

int project_rows(const Layer& layer, Channels kind, bool trained) {
  return rows_for(layer, ceil_div(out_positions(layer), kPositions),
                  chunks_of(layer, kind, {trained}));
}

int gradient_rows(const Layer& layer) {
  return rows_for(layer, tiles_of(layer.images, layer.height, layer.width),
                  chunks_of(layer, Channels::kHidden, {true}));
}

int slices_for(int64_t positions, int64_t others) {
  const int64_t most = positions / kChunk < kMostSlices ? positions / kChunk : kMostSlices;
  return static_cast<int>(between(kBlocks / (others > 0 ? others : 1), 1, most));
}

// The most channels that one of the two other dimensions of a gradient of weights has.
int most_of_a_group(const Layer& layer, int (*count)(const Layer&, const Option&)) {
  int most = 1;
  for (int o = 0; o < layer.options; ++o) {
    const int found = count(layer, layer.option[o]);
    most = found > most ? found : most;
  }
  return most;
}

int hidden_of_a_group(const Layer&, const Option& option) { return option.hidden / option.groups; }

int inputs_of_a_group(const Layer& layer, const Option& option) {
  return layer.in_channels / option.groups;
}

// Fills in what follows from sizes and options.
Layer completed(const Layer& given) {
  Layer layer = given;
  layer.out_height = (layer.height + layer.stride - 1) / layer.stride;
  layer.out_width = (layer.width + layer.stride - 1) / layer.stride;
  layer.hidden = 0;
  int64_t expand = 0, taps = 0, project = 0;
  for (int o = 0; o < layer.options; ++o) {
    Option& option = layer.option[o];
    option.hidden_before = layer.hidden;
    option.expand_before = expand;
    option.taps_before = taps;
    option.project_before = project;
    if (layer.statistics != nullptr) {
      option.statistics = layer.statistics + 4 * static_cast<int64_t>(layer.hidden) +
                          2 * static_cast<int64_t>(o) * layer.out_channels;
    }
    layer.hidden += option.hidden;
    expand += static_cast<int64_t>(option.hidden) * (layer.in_channels / option.groups);
    taps += static_cast<int64_t>(option.hidden) * option.kernel * option.kernel;
    project += static_cast<int64_t>(option.hidden) * (layer.out_channels / option.groups);
  }
  const int64_t pairs = ceil_div(layer.in_channels, kChunk) * ceil_div(layer.in_channels, kChunk);
  layer.chunks = slices_for(in_positions(layer), pairs * 8);
  layer.bands = static_cast<int>(
      between(kBlocks / 4 / (static_cast<int64_t>(layer.images) * (layer.options + 1)), 1,
              layer.out_height));
  const int64_t tiles =
      ceil_div(in_positions(layer), kPositions) * ceil_div(layer.in_channels, kChunk);
  layer.splits = static_cast<int>(between(kBlocks / 4 / tiles, 1, ceil_div(layer.hidden, kChunk)));
  return layer;
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

void place_norms(Layer& layer, Parts& parts) {
  layer.norms = parts.take(4 * (2 * static_cast<int64_t>(layer.hidden) +
                                static_cast<int64_t>(layer.options) * layer.out_channels));
  layer.folded = parts.take(static_cast<int64_t>(folded_rows(layer)) * layer.hidden);
}

void place_forward(Layer& layer, Parts& parts) {
  const int64_t channels = layer.in_channels;
  layer.moments = parts.take(layer.chunks * (1 + channels + channels * channels));
  place_norms(layer, parts);
  layer.depthwise = parts.take(out_positions(layer) * layer.hidden);
  layer.partial =
      parts.take(3 * most(static_cast<int64_t>(expand_rows(layer, false)) * layer.hidden,
                          static_cast<int64_t>(project_rows(layer, Channels::kOut, false)) *
                              layer.options * layer.out_channels));
}

int project_slices(const Layer& layer) {
  return slices_for(out_positions(layer),
                    chunks_of(layer, Channels::kOut, {true}) *
                        ceil_div(most_of_a_group(layer, hidden_of_a_group), kChunk));
}

int expand_slices(const Layer& layer) {
  return slices_for(in_positions(layer),
                    chunks_of(layer, Channels::kHidden, {true}) *
                        ceil_div(most_of_a_group(layer, inputs_of_a_group), kChunk));
}

void place_backward(Layer& layer, Parts& parts) {
  const Weights weights(layer);
  const int64_t outs = layer.out_channels, hidden = layer.hidden, channels = layer.in_channels;
  place_norms(layer, parts);
  layer.band_sums =
      parts.take(static_cast<int64_t>(layer.images) * layer.bands * (layer.options + 1) * 2 * outs);
  layer.output_sums = parts.take(2 * layer.options * outs);
  layer.depthwise = parts.take(out_positions(layer) * hidden);
  layer.products_gradient = parts.take(out_positions(layer) * outs * layer.options);
  layer.hidden_gradient = parts.take(out_positions(layer) * hidden);
  layer.expand_gradient = parts.take(in_positions(layer) * hidden);
  layer.sums = parts.take(4 * hidden);
  layer.partial = parts.take(most(2 * hidden * project_rows(layer, Channels::kHidden, true),
                                  (hidden + weights.taps) * gradient_rows(layer)));
  layer.weight_partial = parts.take(
      most(weights.project * project_slices(layer), weights.expand * expand_slices(layer)));
  layer.correction = parts.take(channels * channels * (layer.options + 1) + channels);
  if (layer.x_gradient != nullptr) {
    layer.input_partial = parts.take(in_positions(layer) * channels * layer.splits);
  }
}

template <int K, int S>
void launch_expand(Launches& run, const Layer& layer, bool trained, bool moments, void* stream) {
  const unsigned chunks = static_cast<unsigned>(chunks_of(layer, Channels::kHidden, {trained, K}));
  const int64_t floats = expand_depthwise_floats<K, S>(most_of_a_group(layer, inputs_of_a_group));
  run(expand_depthwise<K, S>, dim3(static_cast<unsigned>(layer.rows), chunks), kThreads,
      4 * most(floats, kMomentsScratch), stream, layer, trained, moments);
}

template <int S>
void launch_expands(Launches& run, const Layer& layer, bool trained, bool moments, void* stream) {
  launch_expand<3, S>(run, layer, trained, moments, stream);
  launch_expand<5, S>(run, layer, trained, moments, stream);
  launch_expand<7, S>(run, layer, trained, moments, stream);
}

void launch_expands(Launches& run, const Layer& layer, bool trained, bool moments, void* stream) {
  if (layer.stride == 1) {
    launch_expands<1>(run, layer, trained, moments, stream);
  } else {
    launch_expands<2>(run, layer, trained, moments, stream);
  }
}

template <int K, int S>
void launch_gradient(Launches& run, const Layer& layer, void* stream) {
  const unsigned chunks = static_cast<unsigned>(chunks_of(layer, Channels::kHidden, {true, K}));
  const int64_t floats = depthwise_gradient_floats<K, S>(most_of_a_group(layer, inputs_of_a_group));
  run(depthwise_gradient<K, S>, dim3(static_cast<unsigned>(layer.rows), chunks), kThreads,
      4 * floats, stream, layer);
}

template <int S>
void launch_gradients(Launches& run, const Layer& layer, void* stream) {
  launch_gradient<3, S>(run, layer, stream);
  launch_gradient<5, S>(run, layer, stream);
  launch_gradient<7, S>(run, layer, stream);
}

const char* forward(Layer layer, void* stream) {
  Launches run;
  const int64_t tiles = ceil_div(layer.in_channels, kChunk);
  const int64_t pairs = static_cast<int64_t>(layer.in_channels) * layer.in_channels;
  run(input_moments,
      dim3(static_cast<unsigned>(tiles * tiles), static_cast<unsigned>(layer.chunks)), kThreads,
      4 * kOuterScratch, stream, layer);
  run(finish_moments, dim3(blocks_for(pairs, kThreads)), kThreads, 0, stream, layer);
  run(first_statistics, dim3(blocks_for(layer.hidden, kWarps)), kThreads, 0, stream, layer);
  layer.rows = expand_rows(layer, false);
  launch_expands(run, layer, false, true, stream);
  run(second_statistics, dim3(blocks_for(layer.hidden, kWarps)), kThreads, 0, stream, layer);
  layer.rows = project_rows(layer, Channels::kOut, false);
  const unsigned outs = static_cast<unsigned>(chunks_of(layer, Channels::kOut, {}));
  run(project, dim3(static_cast<unsigned>(layer.rows), outs), kThreads, 4 * kProductFloats, stream,
      layer);
  const int64_t channels = static_cast<int64_t>(layer.options) * layer.out_channels;
  run(third_statistics, dim3(blocks_for(channels, kWarps)), kThreads, 0, stream, layer);
  const unsigned out_chunks = blocks_for(layer.out_channels, kChunk);
  run(combine,
      dim3(static_cast<unsigned>(between(ceil_div(out_positions(layer), kWarps), 1, kBlocks)),
           out_chunks),
      kThreads, 0, stream, layer);
  return run.failure;
}

// Gradients of the hidden channels and of all weights but those of the first convolutions.
void backward_hidden(Launches& run, Layer& layer, bool weights, void* stream) {
  const unsigned hidden = blocks_for(layer.hidden, kWarps);
  run(products_gradient,
      dim3(static_cast<unsigned>(between(ceil_div(out_positions(layer), kWarps), 1, kBlocks)),
           blocks_for(layer.out_channels, kChunk), static_cast<unsigned>(layer.options)),
      kThreads, 0, stream, layer);
  layer.rows = expand_rows(layer, true);
  launch_expands(run, layer, true, false, stream);
  layer.rows = project_rows(layer, Channels::kHidden, true);
  run(project_gradient,
      dim3(static_cast<unsigned>(layer.rows),
           static_cast<unsigned>(chunks_of(layer, Channels::kHidden, {true}))),
      kThreads, 4 * kProductFloats, stream, layer);
  run(finish_second, dim3(hidden), kThreads, 0, stream, layer);
  if (weights) {
    layer.slices = project_slices(layer);
    run(project_weights,
        dim3(static_cast<unsigned>(layer.slices),
             static_cast<unsigned>(chunks_of(layer, Channels::kOut, {true})),
             blocks_for(most_of_a_group(layer, hidden_of_a_group), kChunk)),
        kThreads, 4 * kOuterScratch, stream, layer);
    run(finish_project_weights, dim3(blocks_for(Weights(layer).project, kThreads)), kThreads, 0,
        stream, layer);
  }
  layer.rows = gradient_rows(layer);
  if (layer.stride == 1) {
    launch_gradients<1>(run, layer, stream);
  } else {
    launch_gradients<2>(run, layer, stream);
  }
  if (weights) {
    run(finish_depthwise, dim3(blocks_for(Weights(layer).taps, kThreads)), kThreads, 0, stream,
        layer);
  }
}

void backward_input(Launches& run, Layer& layer, void* stream) {
  layer.slices = expand_slices(layer);
  run(expand_weights,
      dim3(static_cast<unsigned>(layer.slices),
           static_cast<unsigned>(chunks_of(layer, Channels::kHidden, {true})),
           blocks_for(most_of_a_group(layer, inputs_of_a_group), kChunk)),
      kThreads, 4 * kOuterScratch, stream, layer);
  run(finish_first, dim3(blocks_for(layer.hidden, kWarps)), kThreads, 0, stream, layer);
  if (layer.x_gradient == nullptr) return;
  const int64_t channels = layer.in_channels, tiles = ceil_div(channels, kChunk);
  run(input_correction,
      dim3(static_cast<unsigned>(tiles * tiles), static_cast<unsigned>(layer.options)), kThreads,
      4 * kOuterScratch, stream, layer);
  run(finish_correction,
      dim3(blocks_for(channels * channels, kThreads) + blocks_for(channels, kWarps)), kThreads, 0,
      stream, layer);
  run(input_products,
      dim3(blocks_for(in_positions(layer), kPositions), static_cast<unsigned>(tiles),
           static_cast<unsigned>(layer.splits)),
      kThreads, 4 * kProductFloats, stream, layer);
  run(input_gradient, dim3(blocks_for(in_positions(layer) * channels, kThreads)), kThreads, 0,
      stream, layer);
}

const char* backward(Layer layer, void* stream) {
  Launches run;
  bool trained = false, weights = false;
  for (int o = 0; o < layer.options; ++o) {
    trained = trained || layer.option[o].trained;
    weights = weights || layer.option[o].expand_out != nullptr;
  }
  run(restore_norms,
      dim3(blocks_for(
          layer.hidden + ceil_div(static_cast<int64_t>(layer.options) * layer.out_channels, kWarp),
          kWarps)),
      kThreads, 0, stream, layer);
  run(band_sums,
      dim3(static_cast<unsigned>(layer.images * layer.bands),
           static_cast<unsigned>(layer.options + 1), blocks_for(layer.out_channels, kChunk)),
      kThreads, 4 * kThreads, stream, layer);
  if (layer.gate_gradient != nullptr) {
    run(gate_gradient,
        dim3(static_cast<unsigned>(layer.gates_per_image ? layer.images : 1),
             static_cast<unsigned>(layer.gates)),
        kThreads, 8 * kWarps, stream, layer);
  }
  if (layer.x_gradient == nullptr && !weights) return run.failure;
  const int64_t channels = static_cast<int64_t>(layer.options) * layer.out_channels;
  run(finish_outputs, dim3(blocks_for(channels, kWarps)), kThreads, 0, stream, layer);
  if (trained) backward_hidden(run, layer, weights, stream);
  backward_input(run, layer, stream);
  return run.failure;
}

}  // namespace
}  // namespace pynas

PYNAS_EXPORT int64_t pynas_mbconv_layer_bytes() { return sizeof(pynas::Layer); }

// Floats of workspace that a pass over a layer needs, of which sizes and options are set.
PYNAS_EXPORT int64_t pynas_mbconv_workspace(const pynas::Layer* layer, int32_t backward) {
  pynas::Parts parts(nullptr);
  pynas::Layer all = pynas::completed(*layer);
  backward ? pynas::place_backward(all, parts) : pynas::place_forward(all, parts);
  return parts.used();
}

PYNAS_EXPORT const char* pynas_mbconv_forward(const pynas::Layer* layer, float* workspace,
                                              void* stream) {
  pynas::Parts parts(workspace);
  pynas::Layer all = pynas::completed(*layer);
  pynas::place_forward(all, parts);
  return pynas::forward(all, stream);
}

PYNAS_EXPORT const char* pynas_mbconv_backward(const pynas::Layer* layer, float* workspace,
                                               void* stream) {
  pynas::Parts parts(workspace);
  pynas::Layer all = pynas::completed(*layer);
  pynas::place_backward(all, parts);
  return pynas::backward(all, stream);
}
