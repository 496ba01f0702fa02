#include <algorithm>

#include "launch.h"
#include "split.h"

namespace fusedres::cpu {

namespace {

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

// Of every position of an axis: divided here, once, and not for every position of every row.
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

}  // namespace

void launch_bn_relu_maxpool_forward(Dtype dtype, int64_t batch, const Window& window, const void* c, Affine affine,
                                    void* y, uint8_t* indices) {
  const Lines<float> scale = padded(window, affine.scale), shift = padded(window, affine.shift);
  const PoolForwardArgs args{dtype, window, c, scale.data(), shift.data(), y, indices};
  const int64_t rows = batch * window.out_height;
  parallel_chunks(count_chunks(rows, window.width * window.channels), rows, [&](int64_t, int64_t begin, int64_t end) {
    kernels()->bn_relu_maxpool_forward(args, begin, end);
  });
}

void launch_bn_relu_maxpool_backward_reduce(Dtype dtype, int64_t batch, const Window& window, const void* dy,
                                            const uint8_t* indices, const void* c, const float* mean,
                                            float* sum_dz, float* sum_centered) {
  const Lines<float> center = padded(window, mean);
  const Coverings covering(window);
  const int64_t rows = batch * window.height, chunks = count_chunks(rows, window.width * window.channels);
  PartialSums partial(chunks, 2, padded_channels(window));
  parallel_chunks(chunks, rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const PoolBackwardArgs args{dtype, window, covering.rows.data(), covering.columns.data(), dy, c, indices,
                                center.data(), {}, nullptr, partial.scratch(chunk), partial.sums(chunk)};
    kernels()->bn_relu_maxpool_backward(args, begin, end);
  });
  for (int64_t j = 0; j < window.channels; ++j) {
    sum_dz[j] = static_cast<float>(partial.total(0, j, padded_channels(window)));
    sum_centered[j] = static_cast<float>(partial.total(1, j, padded_channels(window)));
  }
}

void launch_bn_relu_maxpool_backward_input(Dtype dtype, int64_t batch, const Window& window, const void* dy,
                                           const uint8_t* indices, const void* c, Coefficients main, void* dc) {
  const Lines<float> a = padded(window, main.a), b = padded(window, main.b), k = padded(window, main.k);
  const Coverings covering(window);
  const PoolBackwardArgs args{dtype, window, covering.rows.data(), covering.columns.data(), dy, c, indices,
                              nullptr, {a.data(), b.data(), k.data()}, dc, nullptr, nullptr};
  const int64_t rows = batch * window.height;
  parallel_chunks(count_chunks(rows, window.width * window.channels), rows, [&](int64_t, int64_t begin, int64_t end) {
    kernels()->bn_relu_maxpool_backward(args, begin, end);
  });
}

}  // namespace fusedres::cpu
