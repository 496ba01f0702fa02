#include <algorithm>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

Window window_of(const Pooling& p) {
  return {p.kernel_size, p.stride, p.padding, p.channels, p.height, p.width, p.pooled_height, p.pooled_width};
}

int64_t padded_channels(const Window& window) {
  const int64_t width = kernels()->width;
  return (window.channels + width - 1) / width * width;
}

// [channels] -> [padded]; null stays null
Lines<float> padded(const Window& window, const float* vector) {
  if (vector == nullptr) return {};
  Lines<float> values(padded_channels(window), 0);
  std::copy(vector, vector + window.channels, values.data());
  return values;
}

// The windows that cover each position of an axis. The divisions are made here once, not at every position of every
// row.
std::vector<Covering> coverings(const Window& window, int64_t size, int64_t out_size) {
  std::vector<Covering> found(size);
  for (int64_t at = 0; at < size; ++at) {
    const int64_t end = at + window.padding;
    const int64_t first = (end - window.kernel_size + window.stride) / window.stride;
    found[at] = {std::max<int64_t>(0, first), std::min(out_size - 1, end / window.stride)};
  }
  return found;
}

struct Coverings {
  explicit Coverings(const Window& window)
      : rows(coverings(window, window.height, window.out_height)),
        columns(coverings(window, window.width, window.out_width)) {}
  std::vector<Covering> rows, columns;
};

// The arguments that both backward passes read.
template <class Args>
PoolBackwardArgs backward_args(const Args& args, const Window& window, const Coverings& covering) {
  PoolBackwardArgs all{};
  all.dtype = args.pooling.dtype;
  all.window = window;
  all.rows = covering.rows.data();
  all.columns = covering.columns.data();
  all.dy = args.dy;
  all.c = args.c;
  all.indices = args.indices;
  return all;
}

}  // namespace

void bn_relu_maxpool_forward(const BnReluMaxpoolForward& args) {
  const Window window = window_of(args.pooling);
  const Lines<float> scale = padded(window, args.scale), shift = padded(window, args.shift);
  const PoolForwardArgs all{args.pooling.dtype, window, args.c, scale.data(), shift.data(), args.y, args.indices};
  const int64_t rows = args.pooling.batch * window.out_height;
  parallel_chunks(count_chunks(rows, window.width * window.channels), rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->bn_relu_maxpool_forward(all, begin, end); });
}

void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& args) {
  const Window window = window_of(args.pooling);
  const Lines<float> center = padded(window, args.mean);
  const Coverings covering(window);
  const int64_t rows = args.pooling.batch * window.height;
  const int64_t chunks = count_chunks(rows, window.width * window.channels);
  PartialSums partial(chunks, 2, padded_channels(window));
  PoolBackwardArgs all = backward_args(args, window, covering);
  all.mean = center.data();
  parallel_chunks(chunks, rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    PoolBackwardArgs mine = all;
    mine.partial = partial.scratch(chunk);
    mine.sums = partial.sums(chunk);
    kernels()->bn_relu_maxpool_backward(mine, begin, end);
  });
  for (int64_t j = 0; j < window.channels; ++j) {
    args.sum_dz[j] = float(partial.total(0, j, padded_channels(window)));
    args.sum_dz_centered[j] = float(partial.total(1, j, padded_channels(window)));
  }
}

void bn_relu_maxpool_backward_input(const BnReluMaxpoolBackwardInput& args) {
  const Window window = window_of(args.pooling);
  const Coefficients& given = args.grads;
  const Lines<float> A = padded(window, given.A), B = padded(window, given.B), K = padded(window, given.K);
  const Coverings covering(window);
  PoolBackwardArgs all = backward_args(args, window, covering);
  all.main = {A.data(), B.data(), K.data()};
  all.dc = args.dc;
  const int64_t rows = args.pooling.batch * window.height;
  parallel_chunks(count_chunks(rows, window.width * window.channels), rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels()->bn_relu_maxpool_backward(all, begin, end); });
}

}  // namespace fusedres::cpu
