#include <algorithm>
#include <cmath>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kSamples = 16;

float element(Dtype dtype, const void* tensor, int64_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(tensor)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(tensor)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// m without the 16 bits that a bfloat16 lacks.
float upper_half(float m) {
  uint32_t bits;
  std::memcpy(&bits, &m, sizeof bits);
  bits &= 0xffff0000u;
  std::memcpy(&m, &bits, sizeof m);
  return m;
}

// A mean of some rows, [channels]: close to the true one, so that sums of c - shift lose nothing. The rows lie at
// multiples of the golden ratio: evenly spread, and in step with no image width. One value far from all others does not
// count. 0 where it is not finite: inf - inf would make NaN of an infinite mean. Of bfloat16 values it has their
// precision: the differences are exact then, where the lower bits of one shift would be rounded the same way in all of
// them, and the errors would add up.
std::vector<float> sampled_mean(const Shape& shape, const void* c) {
  std::vector<float> mean(shape.channels);
  int64_t rows[kSamples];
  const int64_t samples = std::min(kSamples, shape.rows);
  for (int64_t i = 0; i < samples; ++i) {
    const double place = (i + 1) * 0.6180339887498949;
    rows[i] = std::min(shape.rows - 1, static_cast<int64_t>((place - std::floor(place)) * shape.rows));
  }
  if (samples > 0) kernels()->sample_mean({shape.dtype, c, shape.channels, rows, samples, mean.data()});
  for (float& m : mean) {
    if (!std::isfinite(m)) m = 0;
    if (shape.dtype == Dtype::bfloat16) m = upper_half(m);
  }
  return mean;
}

Gradient gradient_of(const Gradients& gradients) {
  if (gradients.mask != nullptr) return Gradient::mask;
  return gradients.relu ? Gradient::sign : Gradient::plain;
}

// Coefficients at the period's length, and the vectors that hold them.
struct RepeatedCoefficients {
  RepeatedCoefficients(const Period& period, const Coefficients& v)
      : a(period.repeat(v.a)), b(period.repeat(v.b)), k(period.repeat(v.k)) {}
  Coefficients get() const { return {a.data(), b.data(), k.data()}; }
  Lines<float> a, b, k;
};

}  // namespace

void launch_bn_stats(const Shape& shape, const void* c, float* mean, float* var) {
  const Period period(shape);
  const std::vector<float> shift = sampled_mean(shape, c);
  const Lines<float> repeated = period.repeat(shift.data());
  const int64_t chunks = count_chunks(period.rows, period.length);
  PartialSums partial(chunks, 2, period.length);
  parallel_chunks(chunks, period.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const StatsArgs args{shape.dtype, c, repeated.data(), partial.scratch(chunk), partial.sums(chunk), period.length};
    kernels()->bn_stats(args, begin, end);
  });
  for (int64_t i = 0; i < period.tail; ++i) {
    const double d = static_cast<double>(element(shape.dtype, c, period.rows * period.length + i)) - repeated[i];
    partial.sums(0)[i] += d;
    partial.sums(0)[period.length + i] += d * d;
  }
  const double rows = static_cast<double>(shape.rows);
  for (int64_t j = 0; j < shape.channels; ++j) {
    const double sum = partial.total(0, j, shape.channels), squares = partial.total(1, j, shape.channels);
    const double variance = (squares - sum * (sum / rows)) / rows;
    mean[j] = static_cast<float>(shift[j] + sum / rows);
    var[j] = static_cast<float>(variance < 0 ? 0 : variance);
  }
}

void launch_bn_add_relu_forward(const Shape& shape, const void* c, Affine affine, const void* residual,
                                Affine residual_affine, bool relu, void* y, uint8_t* mask) {
  const Period period(shape);
  const Lines<float> scale = period.repeat(affine.scale), shift = period.repeat(affine.shift);
  const Lines<float> scale2 = period.repeat(residual_affine.scale), shift2 = period.repeat(residual_affine.shift);
  const Residual form = residual == nullptr ? Residual::none
                        : scale2.empty()    ? Residual::identity
                                            : Residual::projection;
  ForwardArgs args{shape.dtype, form, relu, c, scale.data(), shift.data(), residual,
                   scale2.data(), shift2.data(), y, mask, period.length};
  parallel_chunks(count_chunks(period.rows, period.length), period.rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->bn_add_relu_forward(args, begin, end); });
  if (period.tail == 0) return;
  Tail tail(period);
  args.c = tail.in(c);
  args.residual = tail.in(residual);
  args.y = tail.out(y);
  args.mask = tail.out_mask(mask);
  kernels()->bn_add_relu_forward(args, 0, 1);
  tail.copy_back();
}

void launch_bn_add_relu_backward_reduce(const Shape& shape, const Gradients& gradients, const float* mean,
                                        const void* shortcut_c, const float* shortcut_mean, float* sum_dz,
                                        float* sum_centered, float* sum_shortcut) {
  const Period period(shape);
  const Lines<float> scale = period.repeat(gradients.affine.scale), shift = period.repeat(gradients.affine.shift);
  const Lines<float> center = period.repeat(mean), center2 = period.repeat(shortcut_mean);
  const int64_t chunks = count_chunks(period.rows, period.length);
  PartialSums partial(chunks, 3, period.length);
  BackwardReduceArgs args{shape.dtype, gradient_of(gradients), gradients.dy, gradients.c, gradients.mask,
                          center.data(), scale.data(), shift.data(), shortcut_c, center2.data(),
                          nullptr, nullptr, period.length};
  parallel_chunks(chunks, period.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    BackwardReduceArgs mine = args;
    mine.partial = partial.scratch(chunk);
    mine.sums = partial.sums(chunk);
    kernels()->bn_add_relu_backward_reduce(mine, begin, end);
  });
  if (period.tail != 0) {
    Tail tail(period);
    args.dy = tail.in(gradients.dy);
    args.c = tail.in(gradients.c);
    args.mask = tail.in_mask(gradients.mask);
    args.shortcut_c = tail.in(shortcut_c);
    args.partial = partial.scratch(0);
    args.sums = partial.sums(0);
    kernels()->bn_add_relu_backward_reduce(args, 0, 1);
  }
  float* const results[] = {sum_dz, sum_centered, sum_shortcut};
  for (int64_t index = 0; index < (sum_shortcut == nullptr ? 2 : 3); ++index) {
    for (int64_t j = 0; j < shape.channels; ++j) {
      results[index][j] = static_cast<float>(partial.total(index, j, shape.channels));
    }
  }
}

void launch_bn_add_relu_backward_input(const Shape& shape, const Gradients& gradients, Coefficients main,
                                       const void* shortcut_c, Coefficients shortcut, void* dc, void* dresidual) {
  const Period period(shape);
  const Lines<float> scale = period.repeat(gradients.affine.scale), shift = period.repeat(gradients.affine.shift);
  const RepeatedCoefficients first(period, main), second(period, shortcut);
  BackwardInputArgs args{shape.dtype, gradient_of(gradients), gradients.dy, gradients.c,
                         gradients.mask, scale.data(), shift.data(), first.get(), shortcut_c,
                         second.get(), dc, dresidual, period.length};
  parallel_chunks(count_chunks(period.rows, period.length), period.rows, [&](int64_t, int64_t begin, int64_t end) {
    kernels()->bn_add_relu_backward_input(args, begin, end);
  });
  if (period.tail == 0) return;
  Tail tail(period);
  args.dy = tail.in(gradients.dy);
  args.c = tail.in(gradients.c);
  args.mask = tail.in_mask(gradients.mask);
  args.shortcut_c = tail.in(shortcut_c);
  args.dc = tail.out(dc);
  args.dresidual = tail.out(dresidual);
  kernels()->bn_add_relu_backward_input(args, 0, 1);
  tail.copy_back();
}

void launch_relu_backward(const Shape& shape, const void* dy, const uint8_t* mask, void* dz) {
  const Period period(shape);
  MaskArgs args{shape.dtype, dy, mask, dz, period.length};
  parallel_chunks(count_chunks(period.rows, period.length), period.rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->relu_backward(args, begin, end); });
  if (period.tail == 0) return;
  Tail tail(period);
  args.dy = tail.in(dy);
  args.mask = tail.in_mask(mask);
  args.dz = tail.out(dz);
  kernels()->relu_backward(args, 0, 1);
  tail.copy_back();
}

}  // namespace fusedres::cpu
