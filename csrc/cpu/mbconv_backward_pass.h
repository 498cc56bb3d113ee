// The backward pass of a layer: what its parts share.
#pragma once

#include "mbconv_rows.h"

namespace pynas {
namespace {

// Gradients of the first norm and of the 1x1 convolution before it need only sums over positions:
// with g the gradient of what the norm gives, G1 = sum of g x^T and s = sum of g. What the norm's
// statistics add to the gradient of the input is a product of the input with one small matrix,
// summed over all blocks before it is multiplied.
template <typename T>
struct InputCorrection {
  T* matrix;    // [in, padded in]
  T* constant;  // [in]
};

template <typename T>
class MbBackwardPass {
  static constexpr int64_t kBytes = sizeof(T);
  // What is summed over positions, by hidden channel: the gradient of the second norm's output,
  // that times the deviation of its input, the gradient of the first norm's output, and that times
  // the output.
  enum Sum : int64_t { kGradient2, kAgainst2, kGradient1, kAgainst1, kSums };

 public:
  MbBackwardPass(const MbBackward<T>& args, const Workers& workers);
  void run();

 private:
  // Column sums of the gradient, and against each product: everything that norm3 and the gates
  // need.
  void sum_outputs();
  void gate_gradients();
  void one_option(int64_t index, const Statistics<T>& of);
  void third_norm(int64_t index, const Statistics<T>& of);
  void product_gradient(const Band& band);
  void first_half(const MbOption<T>& option, int64_t first, int64_t channels, int64_t share,
                  int64_t worker);
  void keep_slopes(const Band& band, const Rows<T>& rows, int64_t from, int64_t to,
                   int64_t vectors);
  Expander<T> expander_of(const MbOption<T>& option, int64_t first, int64_t vectors,
                          int64_t worker) const;
  void clear_pads(const Rows<T>& rows, const Share& share) const;
  int64_t lines_of(const MbOption<T>& option, const Expander<T>& expander, const Band& band,
                   int64_t have, const Lines<T>& values, const Lines<T>& gradients);
  void hidden_gradient(const Band& band, int64_t first, int64_t vectors, const Lines<T>& values,
                       const Lines<T>& gradients, T* hidden, double* of_share);
  void mask(const Band& band, int64_t first, int64_t vectors, const Lines<T>& values,
            const Lines<T>& gradients);
  void second_norm(const MbGradients<T>* to, const Statistics<T>& of, int64_t first,
                   int64_t channels);
  void second_half(const MbOption<T>& option, int64_t first, int64_t channels, int64_t share,
                   int64_t worker);
  void convolution_gradient(const MbOption<T>& option, const Band& part, int64_t vectors,
                            const Rows<T>& hidden, const Lines<T>& values,
                            const Lines<T>& gradients, const Rows<T>& to, T* sums);
  void input_rows(const MbOption<T>& option, const Band& band, int64_t first, int64_t vectors,
                  const Rows<T>& hidden, const Rows<T>& gradients, T* lines, double* of_share);
  void add_shares(T* sums, int64_t elements) const;
  void write_expand(const MbOption<T>& option, const MbGradients<T>* to, int64_t first,
                    int64_t channels) const;
  void weight_gradients(const MbOption<T>& option, const MbGradients<T>* to, int64_t first,
                        int64_t channels) const;
  struct FirstNorm {
    T sum[kSliceChannels] = {}, scale[kSliceChannels] = {}, factor[kSliceChannels] = {};
    T square[kSliceChannels] = {}, constant[kSliceChannels] = {};
  };
  void expand_products(int64_t first, int64_t channels, double* products) const;
  void spread_first_norm(const FirstNorm& norm, int64_t first, int64_t channels, bool weights);
  void first_norm(const MbOption<T>& option, const MbGradients<T>* to, const Statistics<T>& of,
                  int64_t first, int64_t channels);
  void correct_input();
  void finish_input();

  Statistics<T> statistics_of(int64_t index) const {
    T* from = args_.saved.statistics;
    for (int64_t o = 0; o < index; ++o) {
      from += Statistics<T>::elements(args_.options[o].hidden, s_.out_channels);
    }
    return {from, args_.options[index].hidden, s_.out_channels};
  }
  double gate(int64_t image, int64_t column) const {
    const T* values = args_.gates.values;
    return values ? static_cast<double>(values[image * args_.gates.image_step + column]) : 1;
  }
  // Without gradients of weights, the sum of gradient times output says of the first norm all that
  // the input's gradient needs, wherever the output tells what went into the activation.
  bool needs_expand_sums() const { return args_.gradients || slopes_; }
  bool residual() const { return s_.stride == 1 && s_.in_channels == s_.out_channels; }
  Rows<T> hidden_rows(const MbOption<T>& option, int64_t worker) const {
    const int64_t pad = option.kernel / 2, room = Rows<T>::room_for(s_.width, pad);
    const int64_t of_worker = stored_ ? 0 : worker * hidden_room_;
    return {hidden_rows_ + of_worker,
            hidden_kept_,
            s_.width,
            pad,
            room,
            slice_vectors_,
            Rows<T>::elements(1, slice_vectors_, hidden_kept_, room),
            zeros_};
  }
  // Where lines from that row on stand.
  Lines<T> lines_at(T* memory, int64_t worker, int64_t row) const {
    if (stored_) return {memory, slice_vectors_, layout_.out_width, 0};
    return {memory + worker * lines_room_, slice_vectors_, layout_.out_width, row};
  }
  int64_t slot(int64_t image, const Band& band) const { return stored_ ? image : image - band.n0; }
  Rows<T> gradient_rows(const MbOption<T>& option, int64_t worker) const {
    const int64_t pad = option.kernel / 2, room = Rows<T>::room_for(layout_.out_width, pad);
    return {gradient_rows_ + worker * gradient_room_,
            kept_,
            layout_.out_width,
            pad,
            room,
            slice_vectors_,
            Rows<T>::elements(1, slice_vectors_, kept_, room),
            zeros_};
  }

  const MbBackward<T>& args_;
  const MbShape& s_;
  const Workers& workers_;
  const Layout<T> layout_;
  Packed<T> packed_;
  int64_t slice_, slice_vectors_, kept_, gradient_room_, in_room_, out_room_, taps_;
  // What lies between the two halves is kept where that fits the caches, and else computed twice.
  bool stored_;
  int64_t hidden_kept_, hidden_room_, lines_room_;  // rooms: of a worker
  bool slopes_;  // whether slopes of the first activation are kept beside its outputs
  T *hidden_rows_, *slope_rows_, *gradient_rows_, *zeros_;
  T *values_,
      *gradients_;  // lines: outputs of the depthwise convolution; gradients of the norm after
  T *product_gradient_, *input_gradient_, *bands_;
  T *expand_sums_, *project_sums_, *depthwise_sums_;  // of each share
  T *scale3_, *square3_, *constant3_;                 // gradient of the product, by channel
  T *scale2_, *square2_, *constant2_;                 // gradient of the depthwise output
  T* mean2_;                                          // padded
  T* scaled_expand_;                                  // for the correction of the input
  int32_t *scatter_, *out_scatter_;
  ShareSums sums_;
  double* image_sums_;  // [images, 1 + options, out]: of the gradient, and times (product - mean)
  double* image_dots_;  // [images]: of the gradient times the input
  InputCorrection<T> correction_;
  const MbOption<T>* option_ = nullptr;
  const T* products_ = nullptr;
  bool first_slice_ = false;
};

}  // namespace
}  // namespace pynas
