// A tile of a 3x3 convolution without stride, from a halo in shared memory: a step of 32 channels of it is loaded, and
// changed by the prologue, once for all nine taps. The weight's operands pass through a ring, a tap at a time.
#pragma once

#include "halo_plan.h"
#include "product.h"

namespace fusedres::cuda {

constexpr int kHaloElements = kHaloPlaces * kProductDepth;
static_assert(kHaloElements + kRing * kOperandElements == kProductBytes / 2);
static_assert(kHaloElements * 2 % int(sizeof(OperandRow)) == 0);
static_assert(kTapsOfLine == kRing);  // a tap's place in the ring is its column

// A lane of a warp gives load_matrices its row of each of four fragments, which are 16 rows apart.
__device__ __forceinline__ int halo_row(int thread) { return Accumulators::first_row(thread) + thread % 16; }

// Which taps of these rows are inside the image.
struct TapsInside {
  unsigned of_pair[2];  // of fragments 2i and 2i + 1, 16 bits each

  // first_row: of the tile; rows: those it has
  __device__ __forceinline__ TapsInside(const HaloPlan& plan, int64_t first_row, int rows) {
    const int row = halo_row(thread_index());
    const int64_t line = first_row / plan.width;
    const int w = int(first_row - line * plan.width), h = int(line % plan.height);
    unsigned taps[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) taps[i] = row + 16 * i < rows ? plan.taps_inside(h, w, row + 16 * i) : 0u;
    of_pair[0] = taps[0] | taps[1] << 16, of_pair[1] = taps[2] | taps[3] << 16;
  }
  __device__ __forceinline__ bool has(int fragment, int line, int column) const {
    return (of_pair[fragment / 2] >> (line * kTapsOfLine) & (1u << (fragment % 2 * 16 + column))) != 0u;
  }
};

// acc += the halo's rows at one tap, times the weight's operand of that tap. first: the first of the halo's places
template <class Right, class T>
__device__ __forceinline__ void multiply_tap(Accumulators& acc, const T* halo, int first, const HaloPlan& plan,
                                             const TapsInside& inside, int line, int column, int thread,
                                             const T* right) {
  const int lane = thread % 32;
  const SharedAddress b_row = address_of(right, Right::right_place(Accumulators::first_column(thread), 0, lane));
  const int place =
      int(sizeof(T)) * DepthInside::place(first + plan.place_of(halo_row(thread), line, column), lane / 16);
#pragma unroll
  for (int k = 0; k < kProductDepth / 16; ++k) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) load_matrices<Right::kTransposed>(b[j], Right::moved(b_row, j, k));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // in bytes, so that what is selected is a register or a constant, and nothing is left to compute
      constexpr int kFragment = int(sizeof(T)) * 16 * kProductDepth,
                    kZero = int(sizeof(T)) * kZeroPlace * kProductDepth;
      const int at = inside.has(i, line, column) ? place ^ (k * 16 * int(sizeof(T))) : kZero - i * kFragment;
      uint32_t a[4];
      load_matrices<false>(a, reinterpret_cast<const char*>(halo) + at + i * kFragment);
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_add<T>(acc.value[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// use(place) for each place of the halo whose chunk this thread loads and changes, from `begin` to `end`.
template <class Use>
__device__ __forceinline__ void for_each_place(int begin, int end, Use use) {
  const ChunkThread<DepthInside> me(thread_index());
#pragma unroll 1
  for (int place = me.row; place < end; place += me.kRowStep)
    if (place >= begin) use(place);
}

// Of a step, the first channel of the chunks that this thread loads and changes.
__device__ __forceinline__ int halo_channel(int step) {
  return step * kProductDepth + ChunkThread<DepthInside>(thread_index()).column * kPacket;
}

// Starts this thread's copies of a step of x [rows, depth] into the places of a halo, zeros where x has no such row.
template <bool kPackets, class T>
__device__ __forceinline__ void load_halo(T* halo, const T* x, const HaloPlan& plan, int64_t first_row, int depth,
                                          int step) {
  const int k = halo_channel(step), chunk = k / kPacket % DepthInside::kChunks;
  const int begin = plan.begin(first_row), end = plan.end(first_row);
  const T* from = x + plan.first_row(first_row) * depth + k;
  for_each_place(0, plan.places(), [&](int place) {
    load_chunk(halo + DepthInside::place(place, chunk), from + place * int64_t(depth),
               begin <= place && place < end ? depth - k : 0, kPackets);
  });
}

// Runs the steps of one tile. load(step, halo) starts a thread's copies into the places of a halo, prepare(step, halo)
// changes what this thread has copied; `weights` gives the weight's operands in the order of taps and steps.
// memory: kProductBytes of shared memory, which nobody reads any more when this returns
template <class Right, class T, class Weights, class Load, class Prepare>
__device__ __forceinline__ void run_halo_steps(Accumulators& acc, T* memory, const HaloPlan& plan,
                                               const TapsInside& inside, int steps, Weights weights, Load load,
                                               Prepare prepare) {
  T* ring = memory + kHaloElements;
  const auto halo = [&](int step) { return memory + plan.first_place(step) * kProductDepth; };
  if (thread_index() < kProductDepth / kPacket)
    store_chunk(memory + DepthInside::place(kZeroPlace, thread_index()), Packet<T, kPacket>{});
#pragma unroll
  for (int tap = 0; tap < 2; ++tap) {
    weights.load(ring + tap * kOperandElements, thread_index());
    weights.next_tap();
    commit_copies();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step == 0 || plan.halves == 1) {
      if (step > 0) __syncthreads();  // nobody reads the step before this one
      load(step, halo(step));
      commit_copies();
      wait_for_copies<0>();
    }
    prepare(step, halo(step));
    const int first = plan.first_place(step), thread = thread_index();  // kept for the taps alone
    const bool last = step + 1 == steps;
#pragma unroll 1
    for (int line = 0; line < kTapsOfLine; ++line) {
#pragma unroll Weights::kUnrolled
      for (int column = 0; column < kTapsOfLine; ++column) {
        const bool ends = line + 1 == kTapsOfLine;
        wait_for_copies<1>();
        __syncthreads();  // the tap is there, and nobody reads the tap before it, whose place is loaded again
        if (column == 0 || !ends || !last) weights.load(ring + (column + 2) % kRing * kOperandElements, thread);
        column == 0 && ends ? weights.next_step() : weights.next_tap();
        if (column == 0 && line == 0 && plan.halves == 2 && !last) load(step + 1, halo(step + 1));
        commit_copies();  // an empty group too: waits count groups
        multiply_tap<Right>(acc, memory, first, plan, inside, line, column, thread, ring + column * kOperandElements);
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();
}

}  // namespace fusedres::cuda
