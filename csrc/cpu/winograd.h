// What the launchers of Winograd's convolutions share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "launch.h"
#include "lines.h"
#include "scratch.h"

namespace fusedres::cpu {

constexpr int64_t kBytesOfChunk = 512 << 10;  // of transformed values that one thread works on, in the second cache

inline const WinogradKernels& winograd(const Conv3x3& args) {
  return args.tile == 2 ? kernels()->small : kernels()->large;
}

inline int64_t lanes_of_panel() { return kVectorsOfPanel * kernels()->width; }

// How many vectors hold so many channels.
inline int64_t vectors_of(int64_t channels) { return divided_up(channels, kernels()->width); }

// Channels, padded to whole vectors.
inline int64_t padded(int64_t channels) { return vectors_of(channels) * kernels()->width; }

inline TiledImages tiled(const Conv3x3& args, int64_t channels, int64_t outputs) {
  return {
      args.batch, args.height, args.width, channels, divided_up(args.height, outputs), divided_up(args.width, outputs)};
}

inline int64_t count_tiles(const TiledImages& images) { return images.batch * images.down * images.across; }

// Calls body(task, begin, end) for each of `tasks` equal shares of [0, size), in parallel.
template <class F>
void share(int64_t tasks, int64_t size, F body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) body(task, size * task / tasks, size * (task + 1) / tasks);
  });
}

// The products plane by plane, `depth` of what is summed at a time.
inline void multiply(const PlaneProducts& all, int64_t depth) {
  for (int64_t plane = 0; plane < all.planes; ++plane) {
    for (int64_t k = 0; k < all.depth; k += depth) {
      PlaneProducts part = all;
      part.planes = 1;
      part.depth = std::min(depth, all.depth - k);
      part.a += plane * all.a_plane + k * all.a_depth;
      part.b += plane * all.b_plane + k * all.b_depth;
      part.result += plane * all.result_plane;
      part.add = all.add || k > 0;
      kernels()->multiply_planes(part);
    }
  }
}

}  // namespace fusedres::cpu
