#include <algorithm>

#include "launch.h"
#include "scratch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kDepth = 512;             // words summed at once, so that a tile's rows stay in the first cache
constexpr int64_t kProductsOfElement = 64;  // in the time that an element takes to be read and written
constexpr int64_t kPastCaches = int64_t(8) << 20;  // bytes of a result that is written to memory itself

using Pack = void (*)(const PackArgs&, int64_t begin, int64_t end);

// Packs a weight as whole panels of its `columns`. A panel is as many words deep as the weight has other channels.
Lines<float> pack(Pack kernel, Dtype dtype, PackArgs args, int64_t columns) {
  const int64_t lanes = kVectorsOfPanel * kernels()->width, panels = (columns + lanes - 1) / lanes;
  const int64_t others = args.in_channels * args.out_channels / std::max<int64_t>(columns, 1);
  const int64_t depth = others * size_of(dtype) / size_of(Dtype::kFloat32);
  Lines<float> packed(panels * lanes * depth);
  args.packed = packed.data();
  parallel_chunks(count_chunks(panels, lanes * depth), panels,
                  [&](int64_t, int64_t begin, int64_t end) { kernel(args, begin, end); });
  return packed;
}

// As many elements as are read and written in the time that a row of `columns` sums of `depth` products takes.
int64_t elements_for(int64_t columns, int64_t depth) {
  return columns * std::max<int64_t>(1, depth / kProductsOfElement);
}

// Memory for the rows that this thread works on. Products of bfloat16 are summed whole: a sum in parts would be rounded
// to bfloat16 between them.
RowsOfProduct rows_of_product(Dtype dtype, int64_t channels) {
  const int64_t words = channels * size_of(dtype) / size_of(Dtype::kFloat32);
  const int64_t depth = dtype == Dtype::kFloat32 ? std::min(words, kDepth) : words, pitch = odd_lines(depth);
  return {scratch(Scratch::kOwn, kRowsOfProduct * pitch), depth, pitch};
}

// Whether the result goes to memory itself: one that the caches would not keep is not read into them first. Pages that
// the system has just cleared are in the caches: those of memory that is not kept.
bool goes_past_caches(bool kept, Dtype dtype, const void* result, int64_t rows, int64_t channels) {
  return kept && dtype == Dtype::kFloat32 && rows * channels * size_of(dtype) >= kPastCaches &&
         channels % kernels()->width == 0 && reinterpret_cast<uintptr_t>(result) % kLineBytes == 0;
}

}  // namespace

void conv_backward_input(const ConvBackwardInput& args) {
  const Convolutions& kernel = *convolutions(args.dtype);
  const PackArgs given{args.in_channels, args.out_channels, args.weight, nullptr};
  const Lines<float> packed = pack(kernel.pack_weight, args.dtype, given, args.in_channels);
  const int64_t positions = args.batch * args.height.out * args.width.out;
  const bool past_caches = goes_past_caches(args.kept, args.dtype, args.dx, positions, args.in_channels);
  const Conv1x1InputArgs all{args, past_caches, packed.data(), {}};
  parallel_chunks(count_chunks(positions, elements_for(args.in_channels, args.out_channels)), positions,
                  [&](int64_t, int64_t begin, int64_t end) {
                    Conv1x1InputArgs mine = all;
                    mine.rows_of_product = rows_of_product(args.dtype, args.out_channels);
                    kernel.conv1x1_backward_input(mine, begin, end);
                  });
}

void conv1x1_forward(const ConvForward& args, bool kept) {
  const Convolutions& kernel = *convolutions(args.dtype);
  const PackArgs given{args.in_channels, args.out_channels, args.weight, nullptr};
  const Lines<float> packed = pack(kernel.pack_weight_transposed, args.dtype, given, args.out_channels);
  const Residual form = args.residual == nullptr         ? Residual::kNone
                        : args.residual_scale == nullptr ? Residual::kIdentity
                                                         : Residual::kProjection;
  const bool past_caches = goes_past_caches(kept, args.dtype, args.y, args.rows, args.out_channels);
  const Conv1x1Args all{args, form, past_caches, packed.data(), {}};
  parallel_chunks(count_chunks(args.rows, elements_for(args.out_channels, args.in_channels)), args.rows,
                  [&](int64_t, int64_t begin, int64_t end) {
                    Conv1x1Args mine = all;
                    mine.rows_of_product = rows_of_product(args.dtype, args.in_channels);
                    kernel.conv1x1_forward(mine, begin, end);
                  });
}

}  // namespace fusedres::cpu
