#include <algorithm>
#include <cstdint>
#include <vector>

#include "launch.h"
#include "scratch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kPositions = 256;  // of dy, of which about as many are packed at a time
constexpr int64_t kFewestOut = 24;   // output channels of a thread: packing x must pay
constexpr int64_t kFewestIn = 32;    // input channels of a thread: packing dy must pay

// The largest number up to `limit` that divides the threads: then every thread gets an equal share.
int64_t divisor(int64_t threads, int64_t limit) {
  int64_t pieces = std::clamp<int64_t>(limit, 1, threads);
  while (threads % pieces != 0) --pieces;
  return pieces;
}

// Sets [x_begin, x_end) to the rows of x, of N*in, that rows [begin, end) of dy, of N*out, read.
void find_rows(ConvWeightArgs& args) {
  const ConvAxis& axis = args.height;
  const int64_t reach = (axis.kernel - 1) * axis.dilation + 1 - axis.padding, last = args.end - 1;
  const auto row = [&](int64_t image, int64_t at) { return image * axis.in + std::clamp<int64_t>(at, 0, axis.in); };
  args.x_begin = row(args.begin / axis.out, args.begin % axis.out * axis.stride - axis.padding);
  args.x_end = std::max(args.x_begin, row(last / axis.out, last % axis.out * axis.stride + reach));
}

// The most rows of x that a piece of rows of dy reads.
int64_t most_rows(ConvWeightArgs args, int64_t piece) {
  const int64_t rows = args.batch * args.height.out;
  int64_t most = piece;
  for (args.begin = 0; args.begin < rows; args.begin = args.end) {
    args.end = std::min(rows, args.begin + piece);
    find_rows(args);
    most = std::max(most, args.x_end - args.x_begin);
  }
  return most;
}

// Adds to the part of dw that `args` is for, piece by piece.
void add_pieces(ConvWeightArgs args) {
  const int64_t rows = args.batch * args.height.out;
  const int64_t piece = std::max<int64_t>(1, kPositions / std::max<int64_t>(args.width.out, 1));
  const int64_t width = kernels()->width, tile = rows_of_tile(width);
  const int64_t panels = (args.last_out - args.first_out + tile - 1) / tile;
  const int64_t size_of_dy = odd_lines(panels * piece * args.width.out * width);
  float* packed =
      scratch(Scratch::kOwn, size_of_dy + most_rows(args, piece) * (args.width.in + args.width.stride) * kPackedIn);
  std::vector<Stretch> stretches(piece);
  args.packed_dy = packed;
  args.packed_x = packed + size_of_dy;
  args.stretches = stretches.data();
  for (; args.begin < rows; args.begin = args.end) {
    args.end = std::min(rows, args.begin + piece);
    find_rows(args);
    convolutions(args.dtype)->conv_backward_weight(args);
  }
}

}  // namespace

// Threads share the larger number of channels first, then the smaller one, then the taps, as long as the shares are not
// too small. Each element of dw is summed by one thread, in an order that does not depend on the number of threads.
void conv_backward_weight(const ConvBackwardWeight& args) {
  const int64_t threads = torch::stable::get_num_threads(), taps = args.height.kernel * args.width.kernel;
  int64_t blocks = args.out_channels / kFewestOut, parts = args.in_channels / kFewestIn;
  if (args.out_channels >= args.in_channels) {
    blocks = divisor(threads, blocks);
    parts = divisor(threads / blocks, parts);
  } else {
    parts = divisor(threads, parts);
    blocks = divisor(threads / parts, blocks);
  }
  const int64_t groups = std::min(taps, threads / blocks / parts);
  const int64_t lanes = kVectorsOfPanel * kernels()->width, panels = (args.in_channels + lanes - 1) / lanes;
  std::fill_n(args.dw, args.out_channels * taps * args.in_channels, 0.0f);
  torch::stable::parallel_for(0, blocks * parts * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task % blocks, part = task / blocks % parts, group = task / blocks / parts;
      ConvWeightArgs mine{};
      static_cast<ConvBackwardWeight&>(mine) = args;
      mine.first_out = args.out_channels * block / blocks;
      mine.last_out = args.out_channels * (block + 1) / blocks;
      mine.first_in = panels * part / parts * lanes;
      mine.last_in = std::min(args.in_channels, panels * (part + 1) / parts * lanes);
      mine.first_tap = taps * group / groups;
      mine.last_tap = taps * (group + 1) / groups;
      add_pieces(mine);
    }
  });
}

}  // namespace fusedres::cpu
