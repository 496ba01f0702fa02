#include <algorithm>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kPositions = 256;  // about as many are packed at a time: 16 KiB of x
constexpr int64_t kFewestOut = 24;   // output channels of a thread: packing x must pay
constexpr int64_t kFewestIn = 32;    // input channels of a thread: packing dy must pay
constexpr int64_t kVectorsIn = 2;    // of packed_x
constexpr int64_t kSlack = 8;        // floats that packing may write beyond the last

// The most pieces, up to `limit`, that divide the threads: their shares come out equal.
int64_t divisor(int64_t threads, int64_t limit) {
  int64_t pieces = std::clamp<int64_t>(limit, 1, threads);
  while (threads % pieces != 0) --pieces;
  return pieces;
}

}  // namespace

// Threads share the output channels and, where those are too few, the input channels and then the taps: what each adds
// up, and in which order, does not depend on how many there are.
void launch_conv_backward_weight(ConvWeightArgs args) {
  const int64_t threads = torch::stable::get_num_threads(), taps = args.height.kernel * args.width.kernel;
  const int64_t blocks = divisor(threads, args.out_channels / kFewestOut);
  const int64_t parts = divisor(threads / blocks, args.in_channels / kFewestIn);
  const int64_t groups = std::min(taps, threads / blocks / parts);
  const int64_t panel = kVectorsIn * kernels()->width, panels = (args.in_channels + panel - 1) / panel;
  std::fill_n(args.dw, args.out_channels * taps * args.in_channels, 0.0f);
  args.piece = std::max<int64_t>(1, kPositions / std::max<int64_t>(args.width.out, 1));
  const int64_t positions = args.piece * args.width.out;
  torch::stable::parallel_for(0, blocks * parts * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task % blocks, part = task / blocks % parts, group = task / blocks / parts;
      const int64_t channel = args.out_channels * block / blocks;
      const int64_t channels = args.out_channels * (block + 1) / blocks - channel;
      std::vector<float> dy(positions * channels + kSlack), x(positions * panel);
      ConvWeightArgs mine = args;
      mine.first_in = panels * part / parts * panel;
      mine.last_in = std::min(args.in_channels, panels * (part + 1) / parts * panel);
      mine.packed_dy = dy.data();
      mine.packed_x = x.data();
      kernels()->conv_backward_weight(mine, channel, channels, taps * group / groups, taps * (group + 1) / groups);
    }
  });
}

}  // namespace fusedres::cpu
