// Grouped 3x3 convolutions: weights are packed by vectors of results, and rows or vectors shared by threads.
#include "grouped.h"

#include <algorithm>

#include "launch.h"
#include "scratch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kBytesAtOnce = int64_t(256) << 10;  // of inputs that are passed for each vector of results
constexpr int64_t kMostSummed = 512;                  // positions: shorter sums have smaller errors

// Where each lane finds input j of its group within a vector, [in_group][width]; empty where a group is wider.
Lines<int32_t> places_of(const Grouped3x3& args) {
  const int64_t width = kernels()->width;
  if (args.in_group >= width) return {};
  Lines<int32_t> places(args.in_group * width);
  for (int64_t j = 0; j < args.in_group; ++j) {
    for (int64_t lane = 0; lane < width; ++lane) {
      places[j * width + lane] = int32_t(lane / args.in_group * args.in_group + j);
    }
  }
  return places;
}

GroupedArgs walked(const Grouped3x3& args, const Lines<int32_t>& places, const float* x) {
  const int64_t row = args.width.in * args.channels * args.height.stride * int64_t(sizeof(float));
  return {args, places.empty() ? nullptr : places.data(), x, std::max<int64_t>(1, kBytesAtOnce / row)};
}

// The weight [channels, 9, in_group] by vectors of results, [vector][9][in_group][width]. reversed: of the input
// gradient, whose results are the convolution's inputs and whose taps are turned.
Lines<float> pack(const Grouped3x3& args, const float* weight, bool reversed) {
  const int64_t width = kernels()->width, in_group = args.in_group, vectors = args.channels / width;
  Lines<float> packed(args.channels * kTaps * in_group);
  const auto work = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        for (int64_t j = 0; j < in_group; ++j) {
          float* to = packed.data() + ((v * kTaps + tap) * in_group + j) * width;
          for (int64_t lane = 0; lane < width; ++lane) {
            const int64_t channel = v * width + lane, first = channel / in_group * in_group;
            to[lane] = reversed ? weight[((first + j) * kTaps + kTaps - 1 - tap) * in_group + channel - first]
                                : weight[(channel * kTaps + tap) * in_group + j];
          }
        }
      }
    }
  };
  parallel_chunks(count_chunks(vectors, width * kTaps * in_group), vectors, work);
  return packed;
}

void convolve(const Grouped3x3& args, const float* x, const Lines<float>& packed, const float* scale,
              const float* shift, bool relu, float* y) {
  const Lines<int32_t> places = places_of(args);
  const GroupedForwardArgs all{walked(args, places, x), packed.data(), scale, shift, relu, y};
  const int64_t rows = args.batch * args.height.out;
  parallel_chunks(count_chunks(rows, args.width.out * args.channels * args.in_group), rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->grouped.forward(all, begin, end); });
}

}  // namespace

bool grouped_fits(int64_t channels, int64_t in_group) {
  const int64_t width = kernels()->width;
  const bool whole = in_group < width ? width % in_group == 0 : in_group % width == 0;
  return in_group % 4 == 0 && whole && channels % width == 0;
}

void grouped_conv3x3_forward(const Grouped3x3Forward& args) {
  convolve(args, args.x, pack(args, args.weight, false), args.scale, args.shift, args.relu, args.y);
}

void grouped_conv3x3_backward_input(const Grouped3x3BackwardInput& args) {
  convolve(args, args.dy, pack(args, args.weight, true), nullptr, nullptr, false, args.dx);
}

// Each thread takes vectors of results whole: a sum does not depend on the number of threads.
void grouped_conv3x3_backward_weight(const Grouped3x3BackwardWeight& args) {
  const Lines<int32_t> places = places_of(args);
  GroupedArgs walk = walked(args, places, args.x);
  walk.rows_at_once = std::max<int64_t>(1, std::min(walk.rows_at_once, kMostSummed / args.width.out));
  const int64_t width = kernels()->width, vectors = args.channels / width;
  const int64_t products = args.batch * args.height.out * args.width.out * args.in_group * width;
  parallel_chunks(count_chunks(vectors, products), vectors, [&](int64_t, int64_t begin, int64_t end) {
    float* sums = scratch(Scratch::kOwn, kTaps * args.in_group * width);
    kernels()->grouped.backward_weight({walk, args.dy, sums, args.dw}, begin, end);
  });
}

}  // namespace fusedres::cpu
