#include <algorithm>
#include <cmath>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kSamples = 16;

float element(Dtype dtype, const void* tensor, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(tensor)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(tensor)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// m, its lower 16 bits cleared, which bfloat16 lacks.
float upper_half(float m) {
  uint32_t bits;
  std::memcpy(&bits, &m, sizeof bits);
  bits &= 0xffff0000u;
  std::memcpy(&m, &bits, sizeof m);
  return m;
}

// The mean of some rows, [channels]. It is close to the mean of all rows, so that sums of c - shift lose nothing.
// The rows lie at multiples of the golden ratio: evenly spread, and in step with no image width. One value far from all
// others does not count. A mean that is not finite becomes 0: inf - inf would make NaN of an infinite mean. The mean of
// bfloat16 values is cut to bfloat16: then the differences are exact. The lower bits of a finer shift would be rounded
// the same way in every difference, and the errors would add up.
std::vector<float> sampled_mean(const Shape& shape, const void* c) {
  std::vector<float> mean(shape.channels);
  int64_t rows[kSamples];
  const int64_t samples = std::min(kSamples, shape.rows);
  for (int64_t i = 0; i < samples; ++i) {
    const double place = (i + 1) * 0.6180339887498949;
    rows[i] = std::min(shape.rows - 1, int64_t((place - std::floor(place)) * shape.rows));
  }
  if (samples > 0) kernels()->sample_mean({shape.dtype, c, shape.channels, rows, samples, mean.data()});
  for (float& m : mean) {
    if (!std::isfinite(m)) m = 0;
    if (shape.dtype == Dtype::kBFloat16) m = upper_half(m);
  }
  return mean;
}

// Where an op with these arguments takes dz from.
template <class Args>
Gradient gradient_of(const Args& args) {
  if (args.mask != nullptr) return Gradient::kMask;
  return args.relu ? Gradient::kSign : Gradient::kPlain;
}

// Coefficients repeated to the period, and the vectors that hold them.
struct RepeatedCoefficients {
  RepeatedCoefficients(const Period& period, const Coefficients& v)
      : A(period.repeat(v.A)), B(period.repeat(v.B)), K(period.repeat(v.K)) {}
  Coefficients get() const { return {A.data(), B.data(), K.data()}; }
  Lines<float> A, B, K;
};

}  // namespace

void bn_stats(const BnStats& args) {
  const Shape& shape = args.shape;
  const Period period(shape);
  const std::vector<float> shift = sampled_mean(shape, args.c);
  const Lines<float> repeated = period.repeat(shift.data());
  const int64_t chunks = count_chunks(period.rows, period.length);
  PartialSums partial(chunks, 2, period.length);
  parallel_chunks(chunks, period.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const StatsArgs mine{shape.dtype,         args.c,       repeated.data(), partial.scratch(chunk),
                         partial.sums(chunk), period.length};
    kernels()->bn_stats(mine, begin, end);
  });
  for (int64_t i = 0; i < period.tail; ++i) {
    const double d = double(element(shape.dtype, args.c, period.rows * period.length + i)) - repeated[i];
    partial.sums(0)[i] += d;
    partial.sums(0)[period.length + i] += d * d;
  }
  const double rows = double(shape.rows);
  for (int64_t j = 0; j < shape.channels; ++j) {
    const double sum = partial.total(0, j, shape.channels), squares = partial.total(1, j, shape.channels);
    const double variance = (squares - sum * (sum / rows)) / rows;
    args.mean[j] = float(shift[j] + sum / rows);
    args.var[j] = float(variance < 0 ? 0 : variance);
  }
}

void bn_add_relu_forward(const BnAddReluForward& args) {
  const Period period(args.shape);
  const Lines<float> scale = period.repeat(args.scale), shift = period.repeat(args.shift);
  const Lines<float> scale2 = period.repeat(args.residual_scale), shift2 = period.repeat(args.residual_shift);
  const Residual form = args.residual == nullptr ? Residual::kNone
                        : scale2.empty()         ? Residual::kIdentity
                                                 : Residual::kProjection;
  ForwardArgs all{args.shape.dtype, form,          args.relu,     args.c, scale.data(), shift.data(),
                  args.residual,    scale2.data(), shift2.data(), args.y, args.mask,    period.length};
  parallel_chunks(count_chunks(period.rows, period.length), period.rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->bn_add_relu_forward(all, begin, end); });
  if (period.tail == 0) return;
  Tail tail(period);
  all.c = tail.in(args.c);
  all.residual = tail.in(args.residual);
  all.y = tail.out(args.y);
  all.mask = tail.out_mask(args.mask);
  kernels()->bn_add_relu_forward(all, 0, 1);
  tail.copy_back();
}

void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& args) {
  const Period period(args.shape);
  const Lines<float> scale = period.repeat(args.scale), shift = period.repeat(args.shift);
  const Lines<float> center = period.repeat(args.mean), center2 = period.repeat(args.shortcut_mean);
  const int64_t chunks = count_chunks(period.rows, period.length);
  PartialSums partial(chunks, 3, period.length);
  BackwardReduceArgs all{args.shape.dtype, gradient_of(args), args.dy,      args.c,          args.mask,
                         center.data(),    scale.data(),      shift.data(), args.shortcut_c, center2.data(),
                         nullptr,          nullptr,           period.length};
  parallel_chunks(chunks, period.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    BackwardReduceArgs mine = all;
    mine.partial = partial.scratch(chunk);
    mine.sums = partial.sums(chunk);
    kernels()->bn_add_relu_backward_reduce(mine, begin, end);
  });
  if (period.tail != 0) {
    Tail tail(period);
    all.dy = tail.in(args.dy);
    all.c = tail.in(args.c);
    all.mask = tail.in_mask(args.mask);
    all.shortcut_c = tail.in(args.shortcut_c);
    all.partial = partial.scratch(0);
    all.sums = partial.sums(0);
    kernels()->bn_add_relu_backward_reduce(all, 0, 1);
  }
  float* const results[] = {args.sum_dz, args.sum_dz_centered, args.shortcut_sum};
  const int64_t channels = args.shape.channels;
  for (int64_t index = 0; index < (args.shortcut_sum == nullptr ? 2 : 3); ++index) {
    for (int64_t j = 0; j < channels; ++j) results[index][j] = float(partial.total(index, j, channels));
  }
}

void bn_add_relu_backward_input(const BnAddReluBackwardInput& args) {
  const Period period(args.shape);
  const Lines<float> scale = period.repeat(args.scale), shift = period.repeat(args.shift);
  const RepeatedCoefficients main(period, args.grads), shortcut(period, args.shortcut_grads);
  BackwardInputArgs all{args.shape.dtype, gradient_of(args), args.dy,      args.c,          args.mask,
                        scale.data(),     shift.data(),      main.get(),   args.shortcut_c, shortcut.get(),
                        args.dc,          args.dresidual,    period.length};
  parallel_chunks(count_chunks(period.rows, period.length), period.rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->bn_add_relu_backward_input(all, begin, end); });
  if (period.tail == 0) return;
  Tail tail(period);
  all.dy = tail.in(args.dy);
  all.c = tail.in(args.c);
  all.mask = tail.in_mask(args.mask);
  all.shortcut_c = tail.in(args.shortcut_c);
  all.dc = tail.out(args.dc);
  all.dresidual = tail.out(args.dresidual);
  kernels()->bn_add_relu_backward_input(all, 0, 1);
  tail.copy_back();
}

void relu_backward(const ReluBackward& args) {
  const Period period({args.dtype, args.numel, 1});
  MaskArgs all{args.dtype, args.dy, args.mask, args.dz, period.length};
  parallel_chunks(count_chunks(period.rows, period.length), period.rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->relu_backward(all, begin, end); });
  if (period.tail == 0) return;
  Tail tail(period);
  all.dy = tail.in(args.dy);
  all.mask = tail.in_mask(args.mask);
  all.dz = tail.out(args.dz);
  kernels()->relu_backward(all, 0, 1);
  tail.copy_back();
}

}  // namespace fusedres::cpu
