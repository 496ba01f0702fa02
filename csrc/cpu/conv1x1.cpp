#include <algorithm>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

using Pack = void (*)(const PackArgs&, int64_t begin, int64_t end);

// A weight as whole panels of `columns`, of as many words as it has other channels.
Lines<float> pack(Pack kernel, Dtype dtype, PackArgs args, int64_t columns) {
  const int64_t lanes = kVectorsOfPanel * kernels()->width, panels = (columns + lanes - 1) / lanes;
  const int64_t others = args.in_channels * args.out_channels / std::max<int64_t>(columns, 1);
  const int64_t depth = others * size_of(dtype) / size_of(Dtype::float32);
  Lines<float> packed(panels * lanes * depth);
  args.packed = packed.data();
  parallel_chunks(count_chunks(panels, lanes * depth), panels,
                  [&](int64_t, int64_t begin, int64_t end) { kernel(args, begin, end); });
  return packed;
}

}  // namespace

void launch_conv_backward_input(Conv1x1InputArgs args, const void* weight) {
  const Convolutions& kernel = *convolutions(args.dtype);
  const PackArgs given{args.in_channels, args.out_channels, weight, nullptr};
  const Lines<float> packed = pack(kernel.pack_weight, args.dtype, given, args.in_channels);
  args.packed_weight = packed.data();
  const int64_t positions = args.batch * args.height.out * args.width.out;
  parallel_chunks(count_chunks(positions, args.in_channels), positions,
                  [&](int64_t, int64_t begin, int64_t end) { kernel.conv1x1_backward_input(args, begin, end); });
}

void launch_conv1x1_forward(Conv1x1Args args, int64_t positions, const void* weight) {
  const Convolutions& kernel = *convolutions(args.dtype);
  const PackArgs given{args.in_channels, args.out_channels, weight, nullptr};
  const Lines<float> packed = pack(kernel.pack_weight_transposed, args.dtype, given, args.out_channels);
  args.packed_weight = packed.data();
  parallel_chunks(count_chunks(positions, args.out_channels), positions,
                  [&](int64_t, int64_t begin, int64_t end) { kernel.conv1x1_forward(args, begin, end); });
}

}  // namespace fusedres::cpu
