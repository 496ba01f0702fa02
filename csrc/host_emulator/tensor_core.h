// Twins of the instructions in csrc/cuda/tensor_core.h: asynchronous copies, and the loads and products of whole warps.
//
//   a copy       lands at once or when it is waited for, at random: both are legal on the device
//   a load       lane i reads the row whose address it gives, so that a race is seen as that lane's
//   a product    8 products at a time are added to the accumulator and what does not fit is cut off, as tensor cores do
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include "scheduler.h"

namespace fusedres::emulator {

inline void land(const Copy& copy) {
  unsigned char* to = static_cast<unsigned char*>(copy.to);
  const unsigned char* from = static_cast<const unsigned char*>(copy.from);
  for (int i = 0; i < 16; ++i) to[i] = i < copy.bytes ? from[i] : 0;
}

inline void start_copy(void* to, const void* from, int bytes) {
  bool late;
  {
    Quiet quiet;
    late = state().random() & 1;
    if (late) state().current->copies.push_back({to, from, bytes, state().current->committed});
  }
  if (!late) land({to, from, bytes, 0});
}

// Lands the copies of all groups but the latest `left`.
inline void wait_for_copies(int left) {
  for (;;) {
    Copy oldest;
    {
      Quiet quiet;
      Thread& me = *state().current;
      if (me.copies.empty() || me.copies[0].group >= me.committed - left) return;
      oldest = me.copies[0];
      me.copies.erase(me.copies.begin());
    }
    land(oldest);
  }
}

// Waits until every lane of the warp has come to `instruction`; the last one acts on what all brought.
FUSEDRES_UNINSTRUMENTED inline void execute_together(const char* instruction, void* mine, void (*act)(void* const*)) {
  Thread& me = *state().current;
  Warp& warp = me.block->warps[me.index.x / 32];
  if (warp.arrived > 0 && warp.instruction != instruction) fail("lanes of one warp meet in different instructions");
  warp.instruction = instruction;
  warp.lanes[me.index.x % 32] = mine;
  const uint64_t seen = warp.generation;
  if (++warp.arrived < 32) return wait_for(warp.generation, seen, instruction);
  warp.arrived = 0;
  act(warp.lanes);
  ++warp.generation;
}

struct LoadedRow {
  uint16_t row[8];
  uint32_t registers[4];
};

FUSEDRES_UNINSTRUMENTED inline uint32_t pair_of(const LoadedRow& low, int at, const LoadedRow& high, int next) {
  return low.row[at] | uint32_t(high.row[next]) << 16;
}

FUSEDRES_UNINSTRUMENTED inline void spread_rows(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const LoadedRow& row = *static_cast<LoadedRow*>(lanes[matrix * 8 + lane / 4]);
      static_cast<LoadedRow*>(lanes[lane])->registers[matrix] = pair_of(row, lane % 4 * 2, row, lane % 4 * 2 + 1);
    }
}

FUSEDRES_UNINSTRUMENTED inline void spread_columns(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const LoadedRow& low = *static_cast<LoadedRow*>(lanes[matrix * 8 + lane % 4 * 2]);
      const LoadedRow& high = *static_cast<LoadedRow*>(lanes[matrix * 8 + lane % 4 * 2 + 1]);
      static_cast<LoadedRow*>(lanes[lane])->registers[matrix] = pair_of(low, lane / 4, high, lane / 4);
    }
}

struct ProductOperands {
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  float* c;           // [4]
};

// The value of each of 65536 bit patterns.
template <class T>
inline const float* values_of_bits() {
  static const std::vector<float> table = [] {
    std::vector<float> made(1 << 16);
    for (unsigned bits = 0; bits < made.size(); ++bits) {
      const uint16_t narrow = uint16_t(bits);
      T value;
      std::memcpy(static_cast<void*>(&value), &narrow, sizeof value);
      made[bits] = float(value);
    }
    return made;
  }();
  return table.data();
}

FUSEDRES_UNINSTRUMENTED inline float cut_to_float(double sum) {
  const float nearest = float(sum);
  const bool away = isfinite(nearest) && fabs(double(nearest)) > fabs(sum);
  return away ? nextafterf(nearest, 0.f) : nearest;
}

// c [16, 8] += a [16, 16] b [16, 8], from and to the registers of 32 lanes
template <class T>
FUSEDRES_UNINSTRUMENTED inline void multiply_in_warp(void* const* lanes) {
  const float* value = values_of_bits<T>();
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const ProductOperands& mine = *static_cast<ProductOperands*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[group + i % 2 * 8][pair + half + i / 2 * 8] = value[mine.a[i] >> (16 * half) & 0xffff];
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) b[pair + half + i * 8][group] = value[mine.b[i] >> (16 * half) & 0xffff];
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<ProductOperands*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int first = 0; first < 16; first += 8) {
        double sum = c[i];
        for (int k = first; k < first + 8; ++k) sum += double(a[row][k]) * double(b[k][column]);
        c[i] = cut_to_float(sum);
      }
    }
  }
}

}  // namespace fusedres::emulator

namespace fusedres::cuda {

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* shared) { return reinterpret_cast<SharedAddress>(shared); }

inline void start_copy_of_16_bytes(void* shared, const void* global, int bytes) {
  require_alignment(shared, 16);
  if (bytes > 0) require_alignment(global, 16);
  emulator::start_copy(shared, global, bytes);
}
inline void start_copy_of_16_bytes(SharedAddress shared, const void* global, int bytes) {
  start_copy_of_16_bytes(reinterpret_cast<void*>(shared), global, bytes);
}
inline void commit_copies() { ++emulator::state().current->committed; }
template <int kLeft>
inline void wait_for_copies() {
  emulator::wait_for_copies(kLeft);
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  require_alignment(row, 16);
  emulator::LoadedRow mine;
  std::memcpy(mine.row, row, sizeof mine.row);
  emulator::execute_together("ldmatrix", &mine, kTransposed ? emulator::spread_columns : emulator::spread_rows);
  std::memcpy(registers, mine.registers, sizeof registers);
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&registers)[4], SharedAddress row) {
  load_matrices<kTransposed>(registers, reinterpret_cast<const void*>(row));
}

template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulator::ProductOperands mine{a, b, c};
  emulator::execute_together("mma.sync", &mine, emulator::multiply_in_warp<T>);
}

template <class T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  multiply_add<T>(c, a, b0, b1);
}

template <class T>
inline uint32_t round_pair_relu(float first, float second) {
  const T values[2] = {T(first < 0.f ? 0.f : first), T(second < 0.f ? 0.f : second)};  // NaN is not below 0
  uint32_t pair;
  std::memcpy(&pair, values, sizeof pair);
  return pair;
}

template <class T>
inline uint32_t subtract_pair(uint32_t left, uint32_t right) {
  const float* value = emulator::values_of_bits<T>();
  const T values[2] = {T(value[left & 0xffff] - value[right & 0xffff]), T(value[left >> 16] - value[right >> 16])};
  uint32_t pair;
  std::memcpy(&pair, values, sizeof pair);
  return pair;
}

inline void spread_bits(uint32_t& first, uint32_t& second, unsigned bits) {
  first = (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
  second = (bits & 4 ? 0xffffu : 0u) | (bits & 8 ? 0xffff0000u : 0u);
}

}  // namespace fusedres::cuda
