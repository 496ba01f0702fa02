// Launch geometry of the CUDA kernels: which thread visits which elements. Plain arithmetic, no CUDA.
//
// An activation is rows x channels in memory (NHWC, rows = N*H*W). Two ways to walk it:
//   PacketPlan  elementwise kernels: the tensor as a flat sequence of packets of 8 elements
//   TilePlan    reductions over rows, and pooling: a block owns `lanes` neighbouring channel groups and every
//               groups-th tile of rows; each block of a reduction ends with one partial result per channel
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#if defined(__CUDACC__)
#define FUSEDRES_HOST_DEVICE __host__ __device__
#else
#define FUSEDRES_HOST_DEVICE
#endif

namespace fusedres::cuda {

constexpr int kPacket = 8;  // elements: one byte of mask, 16 bytes of a 16-bit dtype
constexpr int kPacketThreads = 256;
constexpr int kTileThreads = 320;  // large blocks leave few partials to merge; two of them leave 102 registers
constexpr int kTileLanes = 32;     // channel groups of 8 a block: 512 bytes of a row, and a short merge
constexpr int kTileLanesScalar = 128;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxChannels = 1 << 26;  // of products: a place within 32 rows fits 32 bits

static_assert(kTileLanes <= kTileThreads / 2 && kTileLanesScalar <= kTileThreads / 2);

struct DeviceLimits {
  int multiprocessors;
  int64_t l2_bytes;
};

FUSEDRES_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of the units that this pass visits last the next pass, which walks the other way, finds in L2. Half of L2 is
// for the data that this pass writes.
constexpr int64_t units_kept_in_l2(const DeviceLimits& limits, int64_t bytes_per_unit) {
  return limits.l2_bytes / 2 / (bytes_per_unit > 0 ? bytes_per_unit : 1);
}

struct PacketPlan {
  int64_t packets;  // ceil(numel / 8); the last may be partial
  int64_t numel;
  int64_t kept;  // packets worth keeping in L2 after the pass
  int64_t channels;
  int blocks;
  int threads;
  bool aligned;         // every tensor starts at a multiple of 16 bytes
  bool fixed_channels;  // and 8 divides C, and a thread keeps its 8 channels

  FUSEDRES_HOST_DEVICE constexpr int64_t stride() const { return int64_t(blocks) * threads; }
  FUSEDRES_HOST_DEVICE constexpr int64_t first(int64_t block, int thread) const { return block * threads + thread; }
  FUSEDRES_HOST_DEVICE constexpr int64_t backwards(int64_t step) const { return packets - 1 - step; }
  FUSEDRES_HOST_DEVICE constexpr int64_t first_channel(int64_t packet) const { return packet * kPacket % channels; }
};

struct PacketRequest {
  int64_t numel;
  int64_t channels;
  int blocks_per_multiprocessor;
  int bytes_per_element;  // of all tensors that the pass writes
  bool aligned;
};

inline PacketPlan plan_packets(const PacketRequest& request, const DeviceLimits& limits) {
  PacketPlan plan{};
  plan.numel = request.numel;
  plan.channels = request.channels;
  plan.packets = ceil_div(request.numel, kPacket);
  plan.kept = units_kept_in_l2(limits, int64_t(kPacket) * request.bytes_per_element);
  const int64_t needed = std::max<int64_t>(1, ceil_div(plan.packets, kPacketThreads));
  const int64_t wanted = int64_t(limits.multiprocessors) * request.blocks_per_multiprocessor;
  // the stride must be a multiple of the C/8 packets of a row
  const int64_t row = request.channels % kPacket == 0 ? request.channels / kPacket : 0;
  const int64_t period = row ? row / std::gcd(row, int64_t(kPacketThreads)) : 1;
  plan.aligned = request.aligned;
  plan.fixed_channels = request.aligned && row && period <= std::min(4 * wanted, kMaxGridX);
  const int64_t blocks = std::min({needed, wanted, kMaxGridX});
  plan.blocks = int(plan.fixed_channels ? std::max(period, blocks / period * period) : blocks);
  plan.threads = kPacketThreads;
  return plan;
}

struct TilePlan {
  int64_t rows;
  int64_t channels;
  int64_t kept;    // rows worth keeping in L2 after the pass
  int64_t chunks;  // blockIdx.x: `lanes` channel groups each
  int groups;      // blockIdx.y: interleaved tiles of rows
  int lanes;       // channel groups side by side in a block
  int tile_rows;   // rows side by side in a block
  int vector;      // channels of one group: 8, or 1 for any channel count and alignment

  FUSEDRES_HOST_DEVICE constexpr int threads() const { return lanes * tile_rows; }
  FUSEDRES_HOST_DEVICE constexpr int64_t backwards(int64_t row) const { return rows - 1 - row; }
  FUSEDRES_HOST_DEVICE constexpr int64_t row_stride() const { return int64_t(groups) * tile_rows; }
  FUSEDRES_HOST_DEVICE constexpr int64_t first_row(int64_t group, int thread) const {
    return group * tile_rows + thread / lanes;
  }
  FUSEDRES_HOST_DEVICE constexpr int64_t first_channel(int64_t chunk, int thread) const {
    return (chunk * lanes + thread % lanes) * vector;
  }
  FUSEDRES_HOST_DEVICE constexpr int64_t rows_of_thread(int64_t first) const {
    return first < rows ? (rows - 1 - first) / row_stride() + 1 : 0;
  }
  // floats one block leaves for the last block of its chunk; `values` is per thread
  FUSEDRES_HOST_DEVICE constexpr int64_t partial_floats(int values) const { return int64_t(values) * lanes; }
  FUSEDRES_HOST_DEVICE constexpr int64_t counter_bytes() const { return ceil_div(chunks * 4, 256) * 256; }
  size_t workspace_bytes(int values) const {
    return size_t(counter_bytes() + chunks * groups * partial_floats(values) * 4);
  }
};

struct TileRequest {
  int64_t rows;
  int64_t channels;
  int vector;
  int unroll;  // rows a thread loads at once
  int blocks_per_multiprocessor;
  int bytes_per_element;  // of all tensors that the pass reads and a later pass reads again
};

inline TilePlan plan_tiles(const TileRequest& request, const DeviceLimits& limits) {
  TilePlan plan{};
  plan.rows = request.rows;
  plan.channels = request.channels;
  plan.vector = request.vector;
  plan.kept = units_kept_in_l2(limits, request.channels * request.bytes_per_element);
  const int64_t channel_groups = ceil_div(request.channels, request.vector);
  plan.chunks = ceil_div(channel_groups, request.vector == 1 ? kTileLanesScalar : kTileLanes);
  plan.lanes = int(ceil_div(channel_groups, plan.chunks));
  plan.tile_rows = int(std::max<int64_t>(1, std::min<int64_t>(kTileThreads / plan.lanes, request.rows)));
  const int64_t wanted = int64_t(limits.multiprocessors) * request.blocks_per_multiprocessor / plan.chunks;
  const int64_t needed = ceil_div(request.rows, int64_t(plan.tile_rows) * request.unroll);
  plan.groups = int(std::clamp<int64_t>(std::min(wanted, needed), 1, kMaxGridY));
  return plan;
}

}  // namespace fusedres::cuda
