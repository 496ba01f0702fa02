// One launch for the weights of a block, or for their gradients: a row of blocks for each.
#include "launch.h"
#include "packet.h"

namespace fusedres::cuda {

namespace {
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;  // of a tensor
}  // namespace

template <class From, class To>
__global__ void __launch_bounds__(kThreads) cast_kernel(Cast args) {
  const Cast::Flat& t = args.tensors[blockIdx.y];
  const From* from = static_cast<const From*>(t.from);
  To* to = static_cast<To*>(t.to);
  const bool aligned = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 15) == 0;
  const int64_t stride = int64_t(gridDim.x) * kThreads * kPacket;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPacket; i < t.numel; i += stride) {
    if (aligned && i + kPacket <= t.numel) {
      const Packet<From, kPacket> in = load_packet(from + i, l2_policy(false));
      Packet<To, kPacket> out;
#pragma unroll
      for (int j = 0; j < kPacket; ++j) out.value[j] = round_to<To>(to_float(in.value[j]));
      store_packet(to + i, out, l2_policy(false));
    } else {
      for (int j = 0; j < kPacket && i + j < t.numel; ++j) to[i + j] = round_to<To>(to_float(from[i + j]));
    }
  }
}

cudaError_t cast(const Cast& args, cudaStream_t stream) {
  int64_t numel = 0;
  for (int i = 0; i < args.count; ++i) numel = numel < args.tensors[i].numel ? args.tensors[i].numel : numel;
  if (numel == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(numel, kThreads * kPacket);
  const dim3 grid(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks), unsigned(args.count));
  return for_dtype(args.from, [&](auto from) {
    return for_dtype(args.to, [&](auto to) {
      return launch(cast_kernel<typename decltype(from)::type, typename decltype(to)::type>, grid, dim3(kThreads),
                    stream, args);
    });
  });
}

}  // namespace fusedres::cuda
