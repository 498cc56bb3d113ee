// The backward pass of a layer: its parts, in order.
#pragma once

#include "mbconv_backward_hidden.h"
#include "mbconv_backward_outputs.h"
#include "mbconv_backward_weights.h"

namespace pynas {
namespace {

template <typename T>
MbBackwardPass<T>::MbBackwardPass(const MbBackward<T>& args, const Workers& workers)
    : args_(args),
      s_(args.shape),
      workers_(workers),
      layout_(s_),
      packed_(s_, args.options, workers, true),
      direct_(layout_.direct()),
      slopes_(!direct_ && !slope_from_output(s_.activation)) {
  int64_t kernel = 3, most = 0;
  for (int64_t o = 0; o < s_.options; ++o) {
    kernel = larger(kernel, args.options[o].kernel);
    most = larger(most, padded<T>(args.options[o].hidden));
  }
  taps_ = kernel * kernel;
  const int64_t pad = kernel / 2, at_once = layout_.images_at_once();
  const int64_t in_rows = Layout<T>::rows_at_once(s_.height, s_.width);
  const int64_t out_rows = Layout<T>::rows_at_once(layout_.out_height, layout_.out_width);
  const int64_t in_room = layout_.row_room(s_.width, pad);
  const int64_t out_room = layout_.row_room(layout_.out_width, pad);
  // What one band needs of the hidden rows and of the gradients, with what a kernel reaches beyond.
  const int64_t reach = larger(in_rows + 2 * pad, (out_rows - 1) * s_.stride + kernel);
  kept_ = smaller(layout_.out_height, (in_rows - 1 + 2 * pad) / s_.stride + 1);
  const int64_t of_gradients = Rows<T>::elements(at_once, 1, kept_, out_room);
  const auto of_hidden = [&](int64_t images, int64_t kept) {
    return (slopes_ || direct_ ? 2 : 1) * Rows<T>::elements(images, 1, kept, in_room);
  };
  const int64_t of_lines = layout_.positions * kLanes<T>;
  const int64_t to_store = of_hidden(s_.images, s_.height) + 2 * of_lines;
  stored_ = direct_ || layout_.slice() / kLanes<T> * to_store * kBytes <= kStoredBytes;
  hidden_kept_ = stored_ ? s_.height : smaller(s_.height, reach);
  group_ = stored_ ? layout_.group(kGroupBytes / kBytes, to_store, most)
                   : layout_.group(kRingBytes / kBytes,
                                   of_hidden(at_once, hidden_kept_) + of_gradients, most);
  slice_ = smaller(layout_.slice(), group_);
  const int64_t vectors = group_ / kLanes<T>;
  hidden_room_ = Rows<T>::elements(stored_ ? s_.images : at_once, vectors, hidden_kept_, in_room);
  hidden_rows_ = take<T>(workers, hidden_room_ * (stored_ ? 1 : workers.count));
  second_rows_ =
      slopes_ || direct_ ? take<T>(workers, hidden_room_ * (stored_ ? 1 : workers.count)) : nullptr;
  zeros_ = Rows<T>::take_zero_row(workers, larger(in_room, out_room));
  gradient_room_ = vectors * of_gradients;
  gradient_rows_ = take<T>(workers, workers.count * gradient_room_);
  // Rows of outputs that a band makes, in either half.
  const int64_t most_rows =
      at_once * smaller(layout_.out_height, larger(out_rows, (in_rows - 1 + pad) / s_.stride + 2));
  lines_room_ = most_rows * layout_.out_width * kMostSlice<T> * kLanes<T>;
  values_ = stored_ ? take<T>(workers, of_lines * vectors) : nullptr;
  gradients_ = take<T>(workers, stored_ ? of_lines * vectors : workers.count * lines_room_);
  out_scatter_ = take<int32_t>(workers, most_rows * layout_.out_width);
  const Lines<T> pattern = gradients_at({0, 0, 0}, 0, 0);
  for (int64_t i = 0; i < most_rows * layout_.out_width; ++i) {
    out_scatter_[i] = static_cast<int32_t>(pattern.line(i / layout_.out_width) - pattern.data +
                                           i % layout_.out_width * kLanes<T>);
  }
  product_gradient_ = take<T>(workers, layout_.positions * layout_.out_padded);
  in_room_ = layout_.spread(layout_.in_band_room());
  out_room_ = layout_.spread(layout_.out_band_room());
  bands_ = take<T>(workers, workers.count * larger(in_room_, out_room_) * slice_);
  const int64_t shares = layout_.shares;
  expand_sums_ = take<T>(workers, shares * s_.in_channels * group_);
  project_sums_ = take<T>(workers, shares * s_.out_channels * group_);
  depthwise_sums_ = take<T>(workers, shares * taps_ * group_);
  scale3_ = take<T>(workers, 3 * layout_.out_padded);
  square3_ = scale3_ + layout_.out_padded;
  constant3_ = square3_ + layout_.out_padded;
  T* norms = take<T>(workers, 6 * group_);
  norm1_ = {norms, norms + group_, norms + 2 * group_};
  norm2_ = norm1_.from(3 * group_);
  T* norm = take<T>(workers, 5 * group_);
  norm_ = {norm, norm + group_, norm + 2 * group_, norm + 3 * group_, norm + 4 * group_};
  products1_ = take<double>(workers, group_);
  mean1_ = take<T>(workers, most);
  mean2_ = take<T>(workers, most);
  scaled_expand_ = take<T>(workers, s_.in_channels * most);
  scatter_ = take<int32_t>(workers, Expander<T>::scatter_room(layout_));
  sums_ = {group_, kSums, take<double>(workers, shares * kSums * group_)};
  image_sums_ = take_zeros<double>(workers, s_.images * (1 + s_.options) * s_.out_channels);
  image_dots_ = take_zeros<double>(workers, s_.images);
  correction_ = {take_zeros<T>(workers, s_.in_channels * layout_.in_padded),
                 take_zeros<T>(workers, s_.in_channels)};
  input_gradient_ = args.x_gradient;
  if (args.x_gradient && layout_.in_padded > s_.in_channels) {
    input_gradient_ = take<T>(workers, layout_.in_positions * layout_.in_padded);
  }
}

template <typename T>
void MbBackwardPass<T>::run() {
  sum_outputs();
  gate_gradients();
  begun_ = false;
  for (int64_t o = 0; o < s_.options; ++o) {
    if (args_.options[o].trained && (args_.x_gradient || args_.gradients)) {
      one_option(o, statistics_of(o));
      begun_ = true;
    }
  }
  if (args_.x_gradient) finish_input();
}

template <typename T>
void MbBackwardPass<T>::one_option(int64_t index, const Statistics<T>& of) {
  const MbOption<T>& option = args_.options[index];
  const MbGradients<T>* to = args_.gradients ? args_.gradients + index : nullptr;
  option_ = &option;
  products_ = args_.saved.products + index * layout_.positions * layout_.out_padded;
  third_norm(index, of);
  packed_.read(s_, option, true);
  packed_.fold_first(s_, option, of, 0, packed_.room);
  packed_.fold_second(s_, option, of, 0, packed_.room);
  if (!direct_) {
    if (to) packed_.multiply_covariance(s_, args_.saved.covariance);
    packed_.scale_expand(s_);
  }
  const int64_t hidden = option.hidden;
  memcpy(mean1_, of.mean1, static_cast<size_t>(hidden) * sizeof(T));
  memcpy(mean2_, of.mean2, static_cast<size_t>(hidden) * sizeof(T));
  memset(mean1_ + hidden, 0, static_cast<size_t>(packed_.room - hidden) * sizeof(T));
  memset(mean2_ + hidden, 0, static_cast<size_t>(packed_.room - hidden) * sizeof(T));
  const Rows<T> rows = hidden_rows(option, 0);
  Expander<T>::fill(layout_, rows, scatter_);
  for (int64_t first = 0; first < packed_.room; first += group_) {
    const int64_t channels = smaller(group_, packed_.room - first);
    first_group_ = first == 0;
    parallel(workers_, layout_.shares, [&](int64_t share, int64_t worker) {
      first_half(option, first, channels, share, worker);
    });
    second_norm(to, of, first, channels);
    parallel(workers_, layout_.shares, [&](int64_t share, int64_t worker) {
      second_half(option, first, channels, layout_.turn(share, Way::kDown), worker);
    });
    if (direct_) {
      direct_norm(option, to, of, first, channels);
      parallel(workers_, layout_.shares, [&](int64_t share, int64_t worker) {
        through_first_norm(option, first, channels, share, worker);
      });
    } else {
      first_norm(option, to, of, first, channels);
    }
    if (to) weight_gradients(option, to, first, channels);
  }
  correct_input();
}

}  // namespace
}  // namespace pynas
