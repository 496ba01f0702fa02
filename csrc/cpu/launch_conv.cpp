#include <algorithm>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kPositions = 256;      // about as many are packed at a time: 16 KiB of x
constexpr int64_t kFewestChannels = 24;  // of a thread: packing x must pay
constexpr int64_t kVectorsIn = 2;        // of packed_x
constexpr int64_t kSlack = 8;            // floats that packing may write beyond the last

}  // namespace

// Threads share the output channels and, where those are too few, the taps: what each adds up, and in which order,
// does not depend on how many there are.
void launch_conv_backward_weight(ConvWeightArgs args) {
  const int64_t threads = torch::stable::get_num_threads(), taps = args.height.kernel * args.width.kernel;
  const int64_t blocks = std::clamp<int64_t>(args.out_channels / kFewestChannels, 1, threads);
  const int64_t groups = std::min(taps, (threads + blocks - 1) / blocks);
  std::fill_n(args.dw, args.out_channels * taps * args.in_channels, 0.0f);
  args.piece = std::max<int64_t>(1, kPositions / std::max<int64_t>(args.width.out, 1));
  const int64_t positions = args.piece * args.width.out;
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task / groups, group = task % groups;
      const int64_t channel = args.out_channels * block / blocks;
      const int64_t channels = args.out_channels * (block + 1) / blocks - channel;
      std::vector<float> dy(positions * channels + kSlack), x(positions * kVectorsIn * kernels()->width);
      ConvWeightArgs mine = args;
      mine.packed_dy = dy.data();
      mine.packed_x = x.data();
      kernels()->conv_backward_weight(mine, channel, channels, taps * group / groups, taps * (group + 1) / groups);
    }
  });
}

}  // namespace fusedres::cpu
