// Runs the CPU launchers that share work and memory between threads, from two threads at once.
#include <cstdio>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/grouped.h"
#include "../../../csrc/cpu/launch.h"
#include "torch/csrc/stable/ops.h"

using namespace fusedres;

namespace {

std::vector<float> values(int64_t size, int64_t seed) {
  std::vector<float> made(size);
  for (int64_t i = 0; i < size; ++i) made[i] = float((i * 7919 + seed) % 201 - 100) / 100;
  return made;
}

struct Sizes {
  int64_t batch, side, in, out;
};

void convolve(const Sizes& s, int64_t tile) {
  const Conv3x3 sizes{s.batch, s.side, s.side, s.in, s.out, tile};
  const int64_t positions = s.batch * s.side * s.side;
  const std::vector<float> x = values(positions * s.in, 1), dy = values(positions * s.out, 2);
  const std::vector<float> weight = values(9 * s.in * s.out, 3), scale = values(s.in, 4);
  std::vector<float> y(positions * s.out), dx(positions * s.in), dw(9 * s.in * s.out), mean(s.out), var(s.out);
  Conv3x3Forward forward{};
  static_cast<Conv3x3&>(forward) = sizes;
  forward.x = x.data();
  forward.weight = weight.data();
  forward.in_scale = forward.in_shift = scale.data();
  forward.y = y.data();
  forward.mean = mean.data();
  forward.var = var.data();
  const bool finite = cpu::conv3x3_forward(forward) &&
                      cpu::conv3x3_backward_input({sizes, dy.data(), weight.data(), x.data(), nullptr, dx.data()}) &&
                      cpu::conv3x3_backward_weight({sizes, dy.data(), x.data(), nullptr, nullptr, dw.data()});
  if (!finite) std::puts("not finite");
  const ConvAxis axis{s.side, s.side, 3, 1, 1, 1}, one{s.side, s.side, 1, 1, 0, 1};
  cpu::conv_backward_weight({Dtype::kFloat32, s.batch, s.in, s.out, axis, axis, dy.data(), x.data(), dw.data()});
  cpu::conv_backward_input(
      {Dtype::kFloat32, s.batch, s.in, s.out, one, one, dy.data(), weight.data(), x.data(), nullptr, dx.data()});
}

// A 1x1 convolution of inference with stride 2, and convolutions with groups of four channels.
void infer(const Sizes& s) {
  const int64_t half = (s.side + 1) / 2, channels = 32, positions = s.batch * s.side * s.side;
  const std::vector<float> x = values(positions * channels, 1), dy = values(positions * channels, 2);
  const std::vector<float> weight = values(9 * channels * channels, 3), scale = values(channels, 4);
  std::vector<float> y(positions * channels), dw(9 * 4 * channels);
  ConvForward forward{};
  forward.dtype = Dtype::kFloat32;
  forward.rows = s.batch * half * half;
  forward.in_channels = forward.out_channels = channels;
  forward.x = x.data();
  forward.weight = weight.data();
  forward.scale = forward.shift = scale.data();
  forward.y = y.data();
  forward.height = forward.width = {s.side, half, 1, 2, 0, 1};
  cpu::conv1x1_forward(forward);
  const ConvAxis axis{s.side, s.side, 3, 1, 1, 1};
  const cpu::Grouped3x3 sizes{s.batch, channels, 4, axis, axis};
  cpu::grouped_conv3x3_forward({sizes, x.data(), weight.data(), scale.data(), scale.data(), true, y.data()});
  cpu::grouped_conv3x3_backward_input({sizes, dy.data(), weight.data(), y.data()});
  cpu::grouped_conv3x3_backward_weight({sizes, dy.data(), x.data(), dw.data()});
}

void normalise(const Sizes& s) {
  const int64_t rows = s.batch * s.side * s.side;
  const Shape shape{Dtype::kFloat32, rows, s.out};
  const std::vector<float> c = values(rows * s.out, 5), dy = values(rows * s.out, 6), vector = values(s.out, 7);
  std::vector<float> y(rows * s.out), mean(s.out), var(s.out), sum(s.out), centered(s.out);
  std::vector<uint8_t> mask((rows * s.out + 7) / 8);
  const float* v = vector.data();
  cpu::bn_stats({shape, c.data(), mean.data(), var.data()});
  cpu::bn_add_relu_forward({shape, c.data(), v, v, nullptr, nullptr, nullptr, true, y.data(), mask.data()});
  cpu::bn_add_relu_backward_reduce(
      {shape, dy.data(), c.data(), mask.data(), true, v, v, v, nullptr, nullptr, sum.data(), centered.data(), nullptr});
  cpu::bn_add_relu_backward_input(
      {shape, dy.data(), c.data(), mask.data(), true, v, v, {v, v, v}, nullptr, {}, y.data(), nullptr});
}

void run(uint32_t threads) {
  torch::stable::threads = threads;
  // many tiles; few tiles and many results; more threads than panels; weights that are shared
  for (const Sizes& s : {Sizes{3, 40, 24, 40}, Sizes{1, 7, 40, 136}, Sizes{2, 12, 16, 24}, Sizes{2, 9, 160, 150}}) {
    convolve(s, 4);
    convolve(s, 2);
    normalise(s);
    infer(s);
  }
}

}  // namespace

int main() {
  std::thread other(run, 3);
  run(5);
  other.join();
  std::puts("done");
}
