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

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t lanes_of_panel() { return kVectorsOfPanel * kernels()->width; }

// Channels, padded to whole panels.
inline int64_t padded(int64_t channels) { return divided_up(channels, lanes_of_panel()) * lanes_of_panel(); }

// An odd number of cache lines: planes and rows that lie a power of two apart would share a few lines of the caches.
inline int64_t odd_lines(int64_t floats) { return (divided_up(floats, 16) | 1) * 16; }

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

}  // namespace fusedres::cpu
