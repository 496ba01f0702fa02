// The weight gradient of 3x3 convolutions by Winograd's algorithm.
#include <atomic>

#include "winograd.h"

namespace fusedres::cpu {

namespace {

// Of two cores of Zen 3, where times depend little on any of them.
constexpr int64_t kOwnSums = int64_t(3) << 20;         // bytes of products of which each thread has a copy
constexpr int64_t kMostCopies = 16;                    // so many are added at the end
constexpr int64_t kFewestTiles = 24;                   // of a chunk: its sums are read and written once for each
constexpr int64_t kBytesOfShared = int64_t(24) << 20;  // a chunk that all threads share, in the third cache
constexpr int64_t kFewestShared = 64;                  // tiles of it
constexpr int64_t kOutOfBlock = 48, kInOfBlock = 64;   // channels of products that one thread sums at a time
constexpr int64_t kTilesSummed = 64;                   // at once: shorter sums have smaller errors

class WeightGradient {
 public:
  explicit WeightGradient(const Conv3x3BackwardWeight& args)
      : args_(args),
        kernel_(winograd(args)),
        x_(tiled(args, args.in_channels, kernel_.outputs)),
        dy_(tiled(args, args.out_channels, kernel_.outputs)),
        tiles_(count_tiles(x_)),
        x_row_(odd_lines(padded(args.in_channels))),
        dy_row_(odd_lines(padded(args.out_channels))),
        threads_(torch::stable::get_num_threads()),
        zeros_(std::max(x_row_, dy_row_), 0.0f) {}

  bool run() {
    const int64_t sums = kernel_.planes * args_.out_channels * padded(args_.in_channels) * int64_t(sizeof(float));
    sums <= kOwnSums ? run_by_tiles() : run_by_weights();
    return finite_;
  }

 private:
  // Each thread takes tiles and sums its own copy of the products, which are added at the end.
  void run_by_tiles() {
    const int64_t tasks = std::min({threads_, tiles_, kMostCopies});
    const int64_t row = padded(args_.in_channels), plane = odd_lines(args_.out_channels * row),
                  copy = kernel_.planes * plane;
    float* sums = scratch(Scratch::kShared, tasks * copy);
    const int64_t most = std::max(kFewestTiles, tiles_within(kBytesOfChunk));
    share(tasks, tiles_, [&](int64_t task, int64_t begin, int64_t end) {
      const int64_t chunks = divided_up(end - begin, most), largest = divided_up(end - begin, chunks);
      const int64_t x_plane = odd_lines(largest * x_row_), dy_plane = odd_lines(largest * dy_row_);
      float* x = scratch(Scratch::kOwn, kernel_.planes * (x_plane + dy_plane));
      float* dy = x + kernel_.planes * x_plane;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = begin + (end - begin) * chunk / chunks,
                      last = begin + (end - begin) * (chunk + 1) / chunks;
        transform(first, last, x, x_plane, dy, dy_plane);
        kernels()->multiply_planes({kernel_.planes, args_.out_channels, last - first, vectors_of(args_.in_channels),  //
                                    dy, dy_plane, 1, dy_row_,                                                         //
                                    x, x_plane, lanes_of_panel(), x_row_,                                             //
                                    sums + task * copy, plane, row, chunk > 0});
      }
    });
    share(std::min(threads_, args_.out_channels), args_.out_channels, [&](int64_t, int64_t begin, int64_t end) {
      finish({sums, tasks, copy, plane, row, args_.in_channels, 0, 0, args_.in_channels, args_.dw}, begin, end);
    });
  }

  // All threads transform a chunk of tiles together; then each takes some of the weights.
  void run_by_weights() {
    const int64_t lanes = lanes_of_panel(), vectors = vectors_of(args_.in_channels),
                  panels = divided_up(vectors, kVectorsOfPanel);
    const int64_t most = std::max(kFewestShared, tiles_within(kBytesOfShared));
    const int64_t chunks = divided_up(tiles_, most), largest = divided_up(tiles_, chunks);
    const int64_t x_plane = odd_lines(largest * x_row_), dy_plane = odd_lines(largest * dy_row_);
    const int64_t row = padded(args_.in_channels), plane = odd_lines(args_.out_channels * row);
    float* x = scratch(Scratch::kShared, kernel_.planes * (x_plane + dy_plane + (chunks > 1 ? plane : 0)));
    float *dy = x + kernel_.planes * x_plane, *sums = dy + kernel_.planes * dy_plane;
    const int64_t blocks_in = divided_up(args_.in_channels, kInOfBlock);
    const int64_t smallest = divided_up(args_.out_channels, 2 * rows_of_tile(kernels()->width));
    const int64_t blocks_out =
        std::max(divided_up(args_.out_channels, kOutOfBlock), std::min(smallest, divided_up(threads_, blocks_in)));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = tiles_ * chunk / chunks, last = tiles_ * (chunk + 1) / chunks;
      share(std::min(threads_, last - first), last - first, [&](int64_t, int64_t begin, int64_t end) {
        transform(first + begin, first + end, x + begin * x_row_, x_plane, dy + begin * dy_row_, dy_plane);
      });
      share(std::min(threads_, blocks_out * blocks_in), blocks_out * blocks_in,
            [&](int64_t, int64_t begin, int64_t end) {
              for (int64_t block = begin; block < end; ++block) {
                const int64_t out = block % blocks_out, in = block / blocks_out;
                const int64_t out_first = args_.out_channels * out / blocks_out,
                              out_last = args_.out_channels * (out + 1) / blocks_out;
                const int64_t in_first = panels * in / blocks_in, in_last = panels * (in + 1) / blocks_in;
                float* products = sums + out_first * row + in_first * lanes;
                int64_t products_plane = plane, products_row = row;
                if (chunks == 1) {
                  products_row = (in_last - in_first) * lanes;
                  products_plane = odd_lines((out_last - out_first) * products_row);
                  products = scratch(Scratch::kOwn, kernel_.planes * products_plane);
                }
                const int64_t in_vectors = std::min(vectors, in_last * kVectorsOfPanel) - in_first * kVectorsOfPanel;
                multiply({kernel_.planes, out_last - out_first, last - first, in_vectors,  //
                          dy + out_first, dy_plane, 1, dy_row_,                            //
                          x + in_first * lanes, x_plane, lanes, x_row_,                    //
                          products, products_plane, products_row, chunk > 0},
                         kTilesSummed);
                if (chunk + 1 == chunks) {
                  finish({products, 1, 0, products_plane, products_row, args_.in_channels, out_first, in_first * lanes,
                          std::min(args_.in_channels, in_last * lanes), args_.dw},
                         out_first, out_last);
                }
              }
            });
    }
  }

  // How many tiles' transformed values fit in so many bytes.
  int64_t tiles_within(int64_t bytes) const {
    return bytes / int64_t(sizeof(float)) / kernel_.planes / (x_row_ + dy_row_);
  }

  void transform(int64_t begin, int64_t end, float* x, int64_t x_plane, float* dy, int64_t dy_plane) const {
    kernel_.transform_input(
        {x_, args_.x, args_.in_scale, args_.in_shift, zeros_.data(), x, x_plane, x_row_, padded(args_.in_channels)},
        begin, end);
    kernel_.transform_output_gradient(
        {dy_, args_.dy, nullptr, nullptr, zeros_.data(), dy, dy_plane, dy_row_, padded(args_.out_channels)}, begin,
        end);
  }

  void finish(const WinogradGradientArgs& mine, int64_t begin, int64_t end) {
    if (!kernel_.transform_weight_gradient(mine, begin, end)) finite_ = false;
  }

  const Conv3x3BackwardWeight& args_;
  const WinogradKernels& kernel_;
  TiledImages x_, dy_;
  int64_t tiles_, x_row_, dy_row_, threads_;
  Lines<float> zeros_;
  std::atomic<bool> finite_{true};
};

}  // namespace

bool conv3x3_backward_weight(const Conv3x3BackwardWeight& args) {
  if (args.batch * args.height * args.width == 0) {
    std::fill_n(args.dw, args.out_channels * 9 * args.in_channels, 0.0f);
    return true;
  }
  return WeightGradient(args).run();
}

}  // namespace fusedres::cpu
