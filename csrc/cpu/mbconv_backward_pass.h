// The backward pass of a layer: what its parts share.
#pragma once

#include "depthwise_gradient.h"
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
  static constexpr int64_t kRingBytes = 512 << 10;  // of a group's rows, where it is not stored
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
  void first_half_of(const Expander<T>& expander, const MbOption<T>& option, const Band& band,
                     int64_t share, int64_t worker);
  void keep_slopes(const Band& band, const Expander<T>& expander, int64_t from, int64_t to);
  Expander<T> expander_of(const Channels& slice, const Rows<T>& rows) const;
  void clear_pads(const Rows<T>& rows, const Share& share) const;
  void outer_gradient(const Expander<T>& expander, const Band& band, const Lines<T>& gradients);
  int64_t hidden_for(const Expander<T>& expander, const MbOption<T>& option, const Band& band,
                     int64_t have);
  OuterRow<T> outer_row(const Expander<T>& expander, const Band& band, int64_t row,
                        const Lines<T>& gradients, int64_t kernel, const T** window) const;
  void second_norm(const MbGradients<T>* to, const Statistics<T>& of, int64_t first,
                   int64_t channels);
  void second_half(const MbOption<T>& option, int64_t first, int64_t channels, int64_t share,
                   int64_t worker);
  void convolution_gradient(const Expander<T>& expander, const MbOption<T>& option,
                            const Band& part, const Rows<T>& to, int64_t share, int64_t worker);
  void input_rows(const Expander<T>& expander, const MbOption<T>& option, const Band& band,
                  const Rows<T>& gradients, T* lines, double* of_share);
  void inner_row_2(const InnerRow<T>& line, int64_t kernel, const Rows<T>& gradients, int64_t n,
                   int64_t y) const;
  void inner_of_2(const InnerRow<T>& line) const;
  void inner_raw_2(const InnerRow<T>& line) const;
  void through_first_norm(const MbOption<T>& option, int64_t first, int64_t channels, int64_t share,
                          int64_t worker);
  void input_products(const Channels& slice, const Band& band, const T* lines, int64_t share);
  void add_shares(T* sums, int64_t elements) const;
  void write_expand(const MbOption<T>& option, const MbGradients<T>* to, int64_t first,
                    int64_t channels) const;
  void weight_gradients(const MbOption<T>& option, const MbGradients<T>* to, int64_t first,
                        int64_t channels) const;
  // By channel of a group.
  struct FirstNorm {
    T *sum, *scale, *factor, *square, *constant;
  };
  void expand_products(int64_t first, int64_t channels, double* products) const;
  void spread_first_norm(const FirstNorm& norm, int64_t first, int64_t channels, bool weights);
  void first_norm(const MbOption<T>& option, const MbGradients<T>* to, const Statistics<T>& of,
                  int64_t first, int64_t channels);
  void direct_norm(const MbOption<T>& option, const MbGradients<T>* to, const Statistics<T>& of,
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
    const int64_t pad = option.kernel / 2, room = layout_.row_room(s_.width, pad);
    const int64_t of_worker = stored_ ? 0 : worker * hidden_room_;
    return {hidden_rows_ + of_worker,
            hidden_kept_,
            s_.width,
            pad,
            room,
            group_ / kLanes<T>,
            Rows<T>::elements(1, group_ / kLanes<T>, hidden_kept_, room),
            zeros_};
  }
  // Where a slice's gradients of the second norm's output stand, from that row on.
  Lines<T> gradients_at(const Channels& slice, int64_t worker, int64_t row) const {
    if (stored_) return Lines<T>{gradients_, group_ / kLanes<T>, layout_.out_width}.from(slice.at);
    return {gradients_ + worker * lines_room_, kMostSlice<T>, layout_.out_width, row};
  }
  int64_t slot(int64_t image, const Band& band) const { return stored_ ? image : image - band.n0; }
  Rows<T> gradient_rows(const MbOption<T>& option, int64_t worker) const {
    const int64_t pad = option.kernel / 2, room = layout_.row_room(layout_.out_width, pad);
    return {gradient_rows_ + worker * gradient_room_,
            kept_,
            layout_.out_width,
            pad,
            room,
            group_ / kLanes<T>,
            Rows<T>::elements(1, group_ / kLanes<T>, kept_, room),
            zeros_};
  }

  const MbBackward<T>& args_;
  const MbShape& s_;
  const Workers& workers_;
  const Layout<T> layout_;
  Packed<T> packed_;
  int64_t group_, slice_, kept_, gradient_room_, in_room_, out_room_, taps_;
  // What lies between the two halves is kept where that fits the caches, and else computed twice.
  bool stored_;
  int64_t hidden_kept_, hidden_room_, lines_room_;  // rooms: of a worker
  // Whether what the first norm reads is kept: its statistics are not taken from the input's.
  const bool direct_;
  const bool slopes_;  // whether slopes of the first activation are kept beside its outputs
  // Where hidden rows are, and beside them what `direct_` or `slopes_` keep.
  T *hidden_rows_, *second_rows_;
  T *gradient_rows_, *zeros_;
  T* values_;     // lines: outputs of the depthwise convolution, where they are stored
  T* gradients_;  // lines: gradients of the norm after it
  T *product_gradient_, *input_gradient_, *bands_;
  T *expand_sums_, *project_sums_, *depthwise_sums_;  // of each share
  T *scale3_, *square3_, *constant3_;                 // gradient of the product, by channel
  NormGradient<T> norm1_, norm2_;                     // by channel of a group
  T *mean1_, *mean2_;                                 // padded
  T* scaled_expand_;                                  // for the correction of the input
  int32_t *scatter_, *out_scatter_;
  ShareSums sums_;
  double* image_sums_;  // [images, 1 + options, out]: of the gradient, and times (product - mean)
  double* image_dots_;  // [images]: of the gradient times the input
  InputCorrection<T> correction_;
  const MbOption<T>* option_ = nullptr;
  const T* products_ = nullptr;
  bool begun_ = false;  // whether there are gradients of the input to add to
  bool first_group_ = false;
  FirstNorm norm_;
  // Sum of gradient times the first convolution's output, by channel of a group.
  double* products1_;
};

}  // namespace
}  // namespace pynas
