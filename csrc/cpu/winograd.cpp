// 3x3 convolutions by Winograd's algorithm: the forward and the input gradient.
#include <atomic>
#include <vector>

#include "winograd.h"

namespace fusedres::cpu {

namespace {

constexpr int64_t kDepth = 128;  // channels summed at once: shorter sums have smaller errors
// Of two cores of Zen 3, where times depend little on any of them; kFewTiles of two of Emerald Rapids.
constexpr int64_t kSharedWeights = int64_t(12) << 20;  // bytes of a transformed weight that stays in the third cache
constexpr int64_t kSharedInput = int64_t(32) << 20;    // the same of a transformed input, with what else is used
constexpr int64_t kFewTiles = 32;                      // a thread: all weights would pass for so few
constexpr int64_t kFewestTiles = 6;                    // of a thread that shares a panel of results
constexpr int64_t kFewestRows = 4;                     // tiles of registers in a chunk: the weight passes once for each
constexpr int64_t kDepthOfBlock = 64, kPanelsOfBlock = 2;  // of a weight that is transformed for one thread

// One convolution of tiles: an input, a weight, and what becomes of the results.
class Convolution {
 public:
  Convolution(const Conv3x3& args, int64_t summed, int64_t results, bool reversed)
      : kernel_(winograd(args)),
        in_(tiled(args, summed, kernel_.outputs)),
        out_(tiled(args, results, kernel_.outputs)),
        weight_{nullptr, args.in_channels, args.out_channels, 0, 0, nullptr, 0, 0},
        transform_weight_(reversed ? kernel_.transform_weight_reversed : kernel_.transform_weight),
        tiles_(count_tiles(in_)),
        vectors_(vectors_of(results)),
        panels_(divided_up(vectors_, kVectorsOfPanel)),
        row_(odd_lines(padded(summed))),
        threads_(torch::stable::get_num_threads()) {}

  // Fills `output`, of which the caller has set what follows a product. moments: [tasks()][2, padded results]
  bool run(const float* x, const float* scale, const float* shift, const float* weight, WinogradOutputArgs output) {
    const Lines<float> zeros(row_, 0.0f);
    input_ = {in_, x, scale, shift, zeros.data(), nullptr, 0, row_, padded(in_.channels)};
    weight_.weight = weight;
    output_ = output;
    output_.images = out_;
    finite_ = true;
    by_tiles() ? run_by_tiles() : run_by_results();
    return finite_;
  }

  int64_t tasks() const { return threads_; }
  int64_t padded_results() const { return padded(out_.channels); }

 private:
  int64_t lanes() const { return lanes_of_panel(); }
  int64_t summed() const { return in_.channels; }

  // With many tiles each thread takes tiles, and all share the transformed weight. With few, each thread takes results
  // and transforms their weights as it goes, and all share the transformed input.
  bool by_tiles() const {
    const int64_t weights = kernel_.planes * summed() * padded_results() * int64_t(sizeof(float));
    const int64_t input = kernel_.planes * row_ * tiles_ * int64_t(sizeof(float));
    return input > kSharedInput || (weights <= kSharedWeights && tiles_ > kFewTiles * threads_);
  }

  // So many that a chunk's transformed input and its products stay in the second cache.
  int64_t tiles_of_chunk() const {
    const int64_t rows = rows_of_tile(kernels()->width);
    const int64_t fit = kBytesOfChunk / int64_t(sizeof(float)) / kernel_.planes / (row_ + padded_results());
    return std::max(kFewestRows * rows, fit / rows * rows);
  }

  void run_by_tiles() {
    const int64_t plane = odd_lines(panels_ * lanes() * summed()), panel = summed() * lanes();
    float* weights = scratch(Scratch::kShared, plane * kernel_.planes);
    weight_.last = summed();
    weight_.plane = plane;
    weight_.panel = panel;
    share(std::min(threads_, panels_), panels_, [&](int64_t, int64_t begin, int64_t end) {
      WinogradWeightArgs mine = weight_;
      mine.transformed = weights + begin * panel;
      transform_weight_(mine, begin, end);
    });
    const int64_t tasks = std::min(threads_, tiles_), most = tiles_of_chunk();
    share(tasks, tiles_, [&](int64_t task, int64_t begin, int64_t end) {
      const int64_t chunks = divided_up(end - begin, most), largest = divided_up(end - begin, chunks);
      const int64_t in_plane = odd_lines(largest * row_), out_plane = odd_lines(largest * padded_results());
      float* transformed = scratch(Scratch::kOwn, kernel_.planes * (in_plane + out_plane));
      float* products = transformed + kernel_.planes * in_plane;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = begin + (end - begin) * chunk / chunks,
                      last = begin + (end - begin) * (chunk + 1) / chunks;
        transform_input(first, last, transformed, in_plane);
        multiply({kernel_.planes, last - first, summed(), vectors_,  //
                  transformed, in_plane, row_, 1,                    //
                  weights, plane, panel, lanes(),                    //
                  products, out_plane, padded_results(), false},
                 kDepth);
        finish(task, first, last, products, out_plane, padded_results(), 0, out_.channels);
      }
    });
  }

  void run_by_results() {
    const int64_t in_plane = odd_lines(tiles_ * row_);
    float* transformed = scratch(Scratch::kShared, kernel_.planes * in_plane);
    share(std::min(threads_, tiles_), tiles_, [&](int64_t, int64_t begin, int64_t end) {
      transform_input(begin, end, transformed + begin * row_, in_plane);
    });
    // Threads that are more than there are panels share the tiles of each.
    const int64_t columns = std::min(threads_, panels_);
    const int64_t groups = std::clamp<int64_t>(threads_ / columns, 1, divided_up(tiles_, kFewestTiles));
    share(columns * groups, columns * groups, [&](int64_t task, int64_t, int64_t) {
      const int64_t column = task % columns, group = task / columns;
      multiply_panels(task, {transformed, in_plane}, {tiles_ * group / groups, tiles_ * (group + 1) / groups},
                      {panels_ * column / columns, panels_ * (column + 1) / columns});
    });
  }

  struct Input {
    const float* transformed;
    int64_t plane;
  };
  struct Range {
    int64_t begin, end;
  };

  // The results of some panels for some tiles, with weights that are transformed here, block by block.
  void multiply_panels(int64_t task, Input input, Range tiles, Range panels) {
    const int64_t count = tiles.end - tiles.begin, depth = std::min(summed(), kDepthOfBlock);
    const int64_t panel = depth * lanes(), plane = odd_lines(kPanelsOfBlock * panel);
    const int64_t products_row = kPanelsOfBlock * lanes(), out_plane = odd_lines(count * products_row);
    float* weights = scratch(Scratch::kOwn, kernel_.planes * (plane + out_plane));
    float* products = weights + kernel_.planes * plane;
    for (int64_t first = panels.begin; first < panels.end; first += kPanelsOfBlock) {
      const int64_t last = std::min(panels.end, first + kPanelsOfBlock);
      const int64_t vectors = std::min(vectors_, last * kVectorsOfPanel) - first * kVectorsOfPanel;
      for (int64_t channel = 0; channel < summed(); channel += depth) {
        WinogradWeightArgs mine = weight_;
        mine.first = channel;
        mine.last = std::min(summed(), channel + depth);
        mine.transformed = weights;
        mine.plane = plane;
        mine.panel = panel;
        transform_weight_(mine, first, last);
        const float* rows = input.transformed + tiles.begin * row_ + channel;
        kernels()->multiply_planes({kernel_.planes, count, mine.last - channel, vectors,  //
                                    rows, input.plane, row_, 1,                           //
                                    weights, plane, panel, lanes(),                       //
                                    products, out_plane, products_row, channel > 0});
      }
      finish(task, tiles.begin, tiles.end, products, out_plane, products_row, first * lanes(),
             std::min(out_.channels, last * lanes()));
    }
  }

  void transform_input(int64_t begin, int64_t end, float* transformed, int64_t plane) const {
    TransformArgs mine = input_;
    mine.transformed = transformed;
    mine.plane = plane;
    kernel_.transform_input(mine, begin, end);
  }

  void finish(int64_t task, int64_t begin, int64_t end, const float* products, int64_t plane, int64_t row,
              int64_t first, int64_t last) {
    WinogradOutputArgs mine = output_;
    mine.products = products;
    mine.plane = plane;
    mine.products_row = row;
    mine.first = first;
    mine.last = last;
    if (mine.moments != nullptr) mine.moments += task * 2 * mine.row;
    if (!kernel_.transform_output(mine, begin, end)) finite_ = false;
  }

  const WinogradKernels& kernel_;
  TiledImages in_, out_;
  WinogradWeightArgs weight_;
  void (*transform_weight_)(const WinogradWeightArgs&, int64_t, int64_t);
  int64_t tiles_, vectors_, panels_, row_, threads_;
  TransformArgs input_{};
  WinogradOutputArgs output_{};
  std::atomic<bool> finite_{true};
};

}  // namespace

bool conv3x3_forward(const Conv3x3Forward& args) {
  Convolution convolution(args, args.in_channels, args.out_channels, false);
  const int64_t row = convolution.padded_results(), tasks = convolution.tasks();
  const bool wanted = args.mean != nullptr;
  std::vector<double> moments(wanted ? tasks * 2 * row : 0, 0.0);
  WinogradOutputArgs output{};
  output.y = args.y;
  output.scale = args.scale;
  output.shift = args.shift;
  output.residual = args.residual;
  output.residual_scale = args.residual_scale;
  output.residual_shift = args.residual_shift;
  output.relu = args.relu;
  output.moments = wanted ? moments.data() : nullptr;
  output.row = row;
  const bool finite = convolution.run(args.x, args.in_scale, args.in_shift, args.weight, output);
  const double count = double(args.batch * args.height * args.width);
  for (int64_t c = 0; wanted && c < args.out_channels; ++c) {
    double sum = 0, squares = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      sum += moments[task * 2 * row + c];
      squares += moments[task * 2 * row + row + c];
    }
    const double mean = sum / count;
    args.mean[c] = float(mean);
    args.var[c] = float(std::max(0.0, squares / count - mean * mean));
  }
  return finite;
}

bool conv3x3_backward_input(const Conv3x3BackwardInput& args) {
  Convolution convolution(args, args.out_channels, args.in_channels, true);
  WinogradOutputArgs output{};
  output.y = args.dx;
  output.residual = args.shortcut_dy;
  output.mask = args.mask;
  return convolution.run(args.dy, nullptr, nullptr, args.weight, output);
}

}  // namespace fusedres::cpu
