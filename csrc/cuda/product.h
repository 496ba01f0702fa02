// A tile of a product of 16-bit operands, [128, depth] times [depth, 128], by tensor cores: its operands in shared
// memory, in a ring of steps of 32 of the inner dimension, and the loop over the steps.
//
// An operand arrives in chunks of 8 elements, 16 bytes. A thread loads the same two chunks of each step, and it alone
// changes them before the product: the prologue, which is applied once to an element.
#pragma once

#include "bn_math.h"
#include "product_plan.h"
#include "tensor_core.h"

namespace fusedres::cuda {

constexpr int kOperandElements = kProductSide * kProductDepth;
constexpr int kChunksOfThread = kOperandElements / kPacket / kProductThreads;  // 2
constexpr int kRing = 3;                                         // steps: one is multiplied, one prepared, one loaded
constexpr int kProductBytes = kRing * 2 * kOperandElements * 2;  // 48 KiB

// A row of an operand of 16-bit values in shared memory, at a multiple of its size: the exclusive or of a place can be
// that of its address.
struct alignas(kProductSide * 2) OperandRow {
  uint16_t bits[kProductSide];
};
constexpr int kProductRows = kProductBytes / int(sizeof(OperandRow));

// Blocks of a multiprocessor: the registers of two are too few for some of those that load single elements.
template <bool kPackets>
constexpr int kBlocksOf = kPackets ? kProductBlocks : 1;

// The address of an operand's element.
template <class T>
__device__ __forceinline__ SharedAddress address_of(const T* operand, int place) {
  return shared_address(operand) + SharedAddress(place * int(sizeof(T)));
}

// Where an operand's chunks lie. Chunks of one bank that a fragment's load would read together are kept apart by an
// exclusive or with the row.
struct DepthInside {  // [128][32]: the inner dimension is contiguous in memory
  static constexpr int kChunks = kProductDepth / kPacket;
  __device__ static __forceinline__ int place(int row, int chunk) {
    return row * kProductDepth + (chunk ^ (row >> 1 & 3)) * kPacket;
  }
  // of the chunk that a lane gives for four 8x8 matrices from `side` and `depth` on, see load_matrices
  static constexpr bool kTransposed = false;
  __device__ static __forceinline__ int left_place(int side, int depth, int lane) {
    return place(side + lane % 16, depth / kPacket + lane / 16);
  }
  __device__ static __forceinline__ int right_place(int side, int depth, int lane) {
    return place(side + lane % 8 + lane / 16 * 8, depth / kPacket + lane / 8 % 2);
  }
  // The address 16*sides further along the side and 16*depths along the depth, from one at multiples of 64 and of 32 of
  // them: in one operation at most where these are constants.
  __device__ static __forceinline__ SharedAddress moved(SharedAddress at, int sides, int depths) {
    return (at ^ SharedAddress(depths * 32)) + SharedAddress(sides * 16 * kProductDepth * 2);
  }
};
struct DepthOutside {  // [32][128]
  static constexpr int kChunks = kProductSide / kPacket;
  __device__ static __forceinline__ int place(int row, int chunk) {
    return row * kProductSide + (chunk ^ (row & 7)) * kPacket;
  }
  static constexpr bool kTransposed = true;
  __device__ static __forceinline__ int left_place(int side, int depth, int lane) {
    return place(depth + lane % 8 + lane / 16 * 8, side / kPacket + lane / 8 % 2);
  }
  __device__ static __forceinline__ int right_place(int side, int depth, int lane) {
    return place(depth + lane % 16, side / kPacket + lane / 16);
  }
  __device__ static __forceinline__ SharedAddress moved(SharedAddress at, int sides, int depths) {
    return (at ^ SharedAddress(sides * 32)) + SharedAddress(depths * 16 * kProductSide * 2);
  }
};

// One thread's chunks of an operand: chunk `column` of rows first, first + step.
template <class Layout>
struct ChunkThread {
  static constexpr int kRowStep = kProductThreads / Layout::kChunks;
  static constexpr int kPlaceStep = kProductThreads * kPacket;  // as both layouts repeat within this many rows
  int row, column;

  __device__ __forceinline__ explicit ChunkThread(int thread)
      : row(thread / Layout::kChunks), column(thread % Layout::kChunks) {}

  __device__ __forceinline__ int row_of(int i) const { return row + i * kRowStep; }
  __device__ __forceinline__ int place(int i) const { return Layout::place(row_of(i), column); }
};

// A chunk in shared memory, in one access.
template <class T>
__device__ __forceinline__ Packet<T, kPacket> read_chunk(const T* from) {
  const uint4 word = *reinterpret_cast<const uint4*>(from);
  Packet<T, kPacket> chunk;
  memcpy(&chunk, &word, sizeof chunk);
  return chunk;
}
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const Packet<T, kPacket>& chunk) {
  uint4 word;
  memcpy(&word, &chunk, sizeof word);
  *reinterpret_cast<uint4*>(to) = word;
}

// Loads a chunk into shared memory. Of its elements the first `valid` exist, others become 0.
// packets: the operand's rows are made of whole chunks, at multiples of 16 bytes
template <class T>
__device__ __forceinline__ void load_chunk(T* to, const T* from, int valid, bool packets) {
  if (packets) return start_copy_of_16_bytes(to, from, valid > 0 ? 16 : 0);
#pragma unroll 1
  for (int i = 0; i < kPacket; ++i) to[i] = i < valid ? from[i] : round_to<T>(0.f);
}

// Loads this thread's chunks of an operand, as load_chunk does: chunk i from from(i), of which valid(i) elements exist.
template <bool kPackets, class Layout, class T, class From, class Valid>
__device__ __forceinline__ void load_chunks(T* operand, const ChunkThread<Layout>& me, From from, Valid valid) {
  const SharedAddress to = address_of(operand, me.place(0));
#pragma unroll
  for (int i = 0; i < kChunksOfThread; ++i) {
    if constexpr (kPackets) {
      start_copy_of_16_bytes(to + SharedAddress(i * me.kPlaceStep * int(sizeof(T))), from(i), valid(i) > 0 ? 16 : 0);
    } else {
      load_chunk(operand + me.place(i), from(i), valid(i), false);
    }
  }
}

// A packet in global memory of which the first `valid` elements exist; others are read as 0, and not written.
// packets: as for load_chunk
template <class T>
__device__ __forceinline__ Packet<T, kPacket> load_part(const T* from, int valid, bool packets) {
  if (packets) return load_packet(from, l2_policy(false));
  Packet<T, kPacket> out;
#pragma unroll
  for (int i = 0; i < kPacket; ++i) out.value[i] = i < valid ? from[i] : round_to<T>(0.f);
  return out;
}
// The same as the word that it is in memory: single elements would take a register each. Other blocks read it too.
template <class T>
__device__ __forceinline__ uint4 load_word_part(const T* from, int valid, bool packets) {
  if (packets) return __ldg(reinterpret_cast<const uint4*>(from));
  unsigned words[4] = {0u, 0u, 0u, 0u};
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    uint16_t bits = 0;
    if (i < valid) memcpy(&bits, from + i, sizeof bits);
    words[i / 2] |= unsigned(bits) << (i % 2 * 16);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
template <class T>
__device__ __forceinline__ void store_part(T* to, const Packet<T, kPacket>& packet, int valid, bool packets) {
  if (packets) return store_packet(to, packet, l2_policy(true));
#pragma unroll
  for (int i = 0; i < kPacket; ++i)
    if (i < valid) to[i] = packet.value[i];
}

// The bits of 8 elements from `place` on, of which `valid` exist.
__device__ __forceinline__ unsigned bits_at(const uint8_t* mask, int64_t place, int valid) {
  const int first = int(place % kPacket);
  unsigned bits = mask[place / kPacket];
  if (first != 0 && first + valid > kPacket) bits |= unsigned(mask[place / kPacket + 1]) << kPacket;
  return bits >> first;
}

// The bits of a chunk. kPackets: its place is a multiple of 8
template <bool kPackets>
__device__ __forceinline__ unsigned chunk_bits(const uint8_t* mask, int64_t place, int valid) {
  if constexpr (kPackets) {
    return mask[uint64_t(place) / kPacket];
  } else {
    return bits_at(mask, place, valid);
  }
}

// dz in place of dy, in a chunk in shared memory.
__device__ __forceinline__ void select_chunk(void* at, unsigned bits) {
  uint4* place = static_cast<uint4*>(at);
  uint4 word = *place, kept;
  spread_bits(kept.x, kept.y, bits);
  spread_bits(kept.z, kept.w, bits >> 4);
  *place = make_uint4(word.x & kept.x, word.y & kept.y, word.z & kept.z, word.w & kept.w);
}

// relu(scale*c + shift) of one value, rounded.
template <class T>
__device__ __forceinline__ T activate(T c, float scale, float shift) {
  const T rounded = round_to<T>(affine(to_float(c), scale, shift));
  return passes(to_float(rounded)) ? rounded : round_to<T>(0.f);
}

// The same of N neighbouring values, two at a time.
template <class T, int N>
__device__ __forceinline__ Packet<T, N> activated(const Packet<T, N>& c, const float (&scale)[N],
                                                  const float (&shift)[N]) {
  uint32_t pairs[N / 2];
#pragma unroll
  for (int i = 0; i < N; i += 2)
    pairs[i / 2] = round_pair_relu<T>(affine(value_of(c, i), scale[i], shift[i]),
                                      affine(value_of(c, i + 1), scale[i + 1], shift[i + 1]));
  Packet<T, N> out;
  memcpy(&out, pairs, sizeof out);
  return out;
}

// The same of a chunk in shared memory, in its place.
template <class T>
__device__ __forceinline__ void activate_chunk(T* at, const float (&scale)[kPacket], const float (&shift)[kPacket]) {
  store_chunk(at, activated(read_chunk(at), scale, shift));
}

// Eight values of a channel vector, 0 past its end.
__device__ __forceinline__ void load_vector_chunk(float (&out)[kPacket], const float* vector, int first, int channels,
                                                  bool packets) {
  if (packets && first < channels) return load_vector(out, vector, first);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) out[i] = first + i < channels ? vector[first + i] : 0.f;
}

// The same where a thread has at least one of the channels. kPackets: it has all eight, at a multiple of 16 bytes
template <bool kPackets>
__device__ __forceinline__ void read_vector_chunk(float (&out)[kPacket], const float* vector, int first, int channels) {
  if constexpr (kPackets) {
#pragma unroll
    for (int i = 0; i < kPacket; i += 4) {
      const float4 word = __ldg(reinterpret_cast<const float4*>(vector + first + i));
      out[i] = word.x, out[i + 1] = word.y, out[i + 2] = word.z, out[i + 3] = word.w;
    }
  } else {
    load_vector_chunk(out, vector, first, channels, false);
  }
}

constexpr int kHalf = kPacket / 2;

// Four values of a channel vector, 0 past its end.
__device__ __forceinline__ float4 load_vector_half(const float* vector, int first, int channels, bool packets) {
  if (packets) return __ldg(reinterpret_cast<const float4*>(vector + first));
  const auto at = [&](int i) { return first + i < channels ? vector[first + i] : 0.f; };
  return make_float4(at(0), at(1), at(2), at(3));
}

// The accumulators of one thread: its warp has 64 rows and 32 columns of the tile, as 4 x 4 fragments.
struct Accumulators {
  float value[4][4][4];

  static constexpr int kWarpRows = 64, kWarpColumns = 32;
  __device__ static __forceinline__ int first_row(int thread) { return thread / 128 * kWarpRows; }
  __device__ static __forceinline__ int first_column(int thread) { return thread / 32 % 4 * kWarpColumns; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) value[i / 16][i / 4 % 4][i % 4] = 0.f;
  }
};

// acc += left right, for one step
template <class Left, class Right, class T>
__device__ __forceinline__ void multiply_step(Accumulators& acc, const T* left, const T* right) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  // the left place is kept from step to step, for another one there is no register
  const SharedAddress a_row = address_of(left, Left::left_place(Accumulators::first_row(thread), 0, lane));
  const SharedAddress b_row =
      address_of(right, Right::right_place(Accumulators::first_column(thread_index()), 0, thread_index() % 32));
#pragma unroll
  for (int k = 0; k < kProductDepth / 16; ++k) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) load_matrices<Right::kTransposed>(b[j], Right::moved(b_row, j, k));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      load_matrices<Left::kTransposed>(a, Left::moved(a_row, i, k));
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_add<T>(acc.value[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Runs the steps of one tile. load(step, left, right) starts a thread's copies into two operands [128 * 32];
// prepare(step, left, right) changes what this thread has copied; multiply(step, left, right) follows for all threads.
// ring: kProductBytes of shared memory, which nobody reads any more when this returns
template <class T, class Load, class Prepare, class Multiply>
__device__ __forceinline__ void run_steps(T* ring, int steps, Load load, Prepare prepare, Multiply multiply) {
  const auto left = [&](int slot) { return ring + slot * 2 * kOperandElements; };
  const auto right = [&](int slot) { return left(slot) + kOperandElements; };
  const auto start = [&](int step, int slot) {
    if (step < steps) load(step, left(slot), right(slot));
    commit_copies();  // an empty group too: waits count groups
  };
  start(0, 0);
  start(1, 1);
  wait_for_copies<1>();
  if (steps > 0) prepare(0, left(0), right(0));
  int slot = 0;
  for (int step = 0; step < steps; ++step) {
    const int next = slot == kRing - 1 ? 0 : slot + 1, after = next == kRing - 1 ? 0 : next + 1;
    __syncthreads();  // this step is prepared, and nobody reads the step before it, whose place is loaded again
    start(step + 2, after);
    multiply(step, left(slot), right(slot));
    wait_for_copies<1>();
    if (step + 1 < steps) prepare(step + 1, left(next), right(next));
    slot = next;
  }
  wait_for_copies<0>();
  __syncthreads();
}

}  // namespace fusedres::cuda
