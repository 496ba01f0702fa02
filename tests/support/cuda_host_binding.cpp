// The launchers of csrc/cuda as a Python module, for tests: addresses as integers, one class an argument
// struct.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "../../csrc/cuda/halo_plan.h"
#include "../../csrc/cuda/launchers.h"
#include "../../csrc/cuda/plan.h"
#include "../../csrc/cuda/rows_plan.h"
#include "../../csrc/host_emulator/scheduler.h"
#include "../../csrc/ops.h"

namespace py = pybind11;
using namespace fusedres;
using namespace fusedres::cuda;

namespace {

// A field that holds an address.
template <class Struct, class Field>
void address(py::class_<Struct>& cls, const char* name, Field Struct::* field) {
  cls.def_property(
      name, [field](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*field); },
      [field](Struct& s, uintptr_t value) { s.*field = reinterpret_cast<Field>(value); });
}

// An array of a struct and its count, as one list.
template <class Struct, class Item>
void list(py::class_<Struct>& cls, const char* name, Item (Struct::*field)[Struct::kMost]) {
  cls.attr("most") = Struct::kMost;
  cls.def_property(
      name, [field](const Struct& s) { return std::vector<Item>(s.*field, s.*field + s.count); },
      [field](Struct& s, const std::vector<Item>& items) {
        if (items.size() > size_t(Struct::kMost)) throw py::value_error("more than one launch takes");
        s.count = int(items.size());
        std::copy(items.begin(), items.end(), s.*field);
      });
}

#define VALUE(Struct, name) .def_readwrite(#name, &Struct::name)
#define ADDRESS(cls, Struct, name) address(cls, #name, &Struct::name)

void bind_vectors(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float16", Dtype::kFloat16)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float32", Dtype::kFloat32)
      .value("float64", Dtype::kFloat64);
  py::class_<Shape>(m, "Shape").def(py::init<>()) VALUE(Shape, dtype) VALUE(Shape, rows) VALUE(Shape, channels);
  py::class_<Workspace> workspace(m, "Workspace");
  workspace.def(py::init<>()) VALUE(Workspace, bytes) VALUE(Workspace, zero_bytes);
  ADDRESS(workspace, Workspace, data);
  py::class_<Parameter> parameter(m, "Parameter");
  parameter.def(py::init<>()) VALUE(Parameter, dtype);
  ADDRESS(parameter, Parameter, data);
  py::class_<Coefficients> coefficients(m, "Coefficients");
  coefficients.def(py::init<>());
  ADDRESS(coefficients, Coefficients, A);
  ADDRESS(coefficients, Coefficients, B);
  ADDRESS(coefficients, Coefficients, K);

  using S = BnScaleShift;
  py::class_<S> scale_shift(m, "BnScaleShift");
  scale_shift.def(py::init<>()) VALUE(S, channels) VALUE(S, weight) VALUE(S, bias) VALUE(S, eps);
  ADDRESS(scale_shift, S, mean), ADDRESS(scale_shift, S, var), ADDRESS(scale_shift, S, invstd);
  ADDRESS(scale_shift, S, scale), ADDRESS(scale_shift, S, shift);
  using C = BnBackwardCoefficients;
  py::class_<C> backward(m, "BnBackwardCoefficients");
  backward.def(py::init<>()) VALUE(C, channels) VALUE(C, rows);
  ADDRESS(backward, C, sum_dz), ADDRESS(backward, C, sum_dz_centered), ADDRESS(backward, C, mean);
  ADDRESS(backward, C, invstd), ADDRESS(backward, C, scale), ADDRESS(backward, C, dweight);
  ADDRESS(backward, C, B), ADDRESS(backward, C, K);
}

void bind_lists(py::module_& m) {
  using R = BnRunningStats;
  using N = R::Norm;
  py::class_<N> norm(m, "BnRunningStatsNorm");
  norm.def(py::init<>()) VALUE(N, channels) VALUE(N, keep) VALUE(N, weight) VALUE(N, unbiased);
  ADDRESS(norm, N, mean), ADDRESS(norm, N, var), ADDRESS(norm, N, running_mean), ADDRESS(norm, N, running_var);
  ADDRESS(norm, N, counter);
  py::class_<R> running(m, "BnRunningStats");
  running.def(py::init<>());
  list(running, "norms", &R::norms);
  using F = Cast::Flat;
  py::class_<F> flat(m, "CastFlat");
  flat.def(py::init<>()) VALUE(F, numel);
  ADDRESS(flat, F, from), ADDRESS(flat, F, to);
  py::class_<Cast> casts(m, "Cast");
  casts.def(py::init<>()) VALUE(Cast, from) VALUE(Cast, to);
  list(casts, "tensors", &Cast::tensors);
}

void bind_bn(py::module_& m) {
  py::class_<BnStats> stats(m, "BnStats");
  stats.def(py::init<>()) VALUE(BnStats, shape) VALUE(BnStats, scale_shift);
  ADDRESS(stats, BnStats, c), ADDRESS(stats, BnStats, mean), ADDRESS(stats, BnStats, var);
  using F = BnAddReluForward;
  py::class_<F> forward(m, "BnAddReluForward");
  forward.def(py::init<>()) VALUE(F, shape) VALUE(F, relu);
  ADDRESS(forward, F, c), ADDRESS(forward, F, scale), ADDRESS(forward, F, shift), ADDRESS(forward, F, residual);
  ADDRESS(forward, F, residual_scale), ADDRESS(forward, F, residual_shift), ADDRESS(forward, F, y);
  ADDRESS(forward, F, mask);
  using R = BnAddReluBackwardReduce;
  py::class_<R> reduce(m, "BnAddReluBackwardReduce");
  reduce.def(py::init<>()) VALUE(R, shape) VALUE(R, relu) VALUE(R, coefficients) VALUE(R, shortcut_coefficients);
  ADDRESS(reduce, R, dy), ADDRESS(reduce, R, c), ADDRESS(reduce, R, mask), ADDRESS(reduce, R, mean);
  ADDRESS(reduce, R, scale), ADDRESS(reduce, R, shift), ADDRESS(reduce, R, shortcut_c);
  ADDRESS(reduce, R, shortcut_mean), ADDRESS(reduce, R, sum_dz), ADDRESS(reduce, R, sum_dz_centered);
  ADDRESS(reduce, R, shortcut_sum);
  using I = BnAddReluBackwardInput;
  py::class_<I> input(m, "BnAddReluBackwardInput");
  input.def(py::init<>()) VALUE(I, shape) VALUE(I, relu) VALUE(I, grads) VALUE(I, shortcut_grads);
  ADDRESS(input, I, dy), ADDRESS(input, I, c), ADDRESS(input, I, mask), ADDRESS(input, I, scale);
  ADDRESS(input, I, shift), ADDRESS(input, I, shortcut_c), ADDRESS(input, I, dc), ADDRESS(input, I, dresidual);
  using B = ReluBackward;
  py::class_<B> relu(m, "ReluBackward");
  relu.def(py::init<>()) VALUE(B, dtype) VALUE(B, numel);
  ADDRESS(relu, B, dy), ADDRESS(relu, B, mask), ADDRESS(relu, B, dz);
}

void bind_stem(py::module_& m) {
  using P = Pooling;
  py::class_<P>(m, "Pooling")
      .def(py::init([](Dtype dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel_size,
                       int stride,
                       int padding) { return P{dtype, batch, height, width, channels, kernel_size, stride, padding}; }),
           py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"),
           py::arg("kernel_size"), py::arg("stride"), py::arg("padding"));
  using F = BnReluMaxpoolForward;
  py::class_<F> forward(m, "BnReluMaxpoolForward");
  forward.def(py::init<>()) VALUE(F, pooling);
  ADDRESS(forward, F, c), ADDRESS(forward, F, scale), ADDRESS(forward, F, shift), ADDRESS(forward, F, y);
  ADDRESS(forward, F, indices);
  using R = BnReluMaxpoolBackwardReduce;
  py::class_<R> reduce(m, "BnReluMaxpoolBackwardReduce");
  reduce.def(py::init<>()) VALUE(R, pooling) VALUE(R, coefficients);
  ADDRESS(reduce, R, dy), ADDRESS(reduce, R, indices), ADDRESS(reduce, R, c), ADDRESS(reduce, R, mean);
  ADDRESS(reduce, R, sum_dz), ADDRESS(reduce, R, sum_dz_centered);
  using I = BnReluMaxpoolBackwardInput;
  py::class_<I> input(m, "BnReluMaxpoolBackwardInput");
  input.def(py::init<>()) VALUE(I, pooling) VALUE(I, grads);
  ADDRESS(input, I, dy), ADDRESS(input, I, indices), ADDRESS(input, I, c), ADDRESS(input, I, dc);
}

void bind_convolutions(py::module_& m) {
  py::class_<ConvAxis>(m, "ConvAxis").def(py::init([](int64_t in, int64_t out, int64_t kernel, int64_t stride) {
    return ConvAxis{in, out, kernel, stride, kernel / 2, 1};
  }));
  using F = ConvForward;
  py::class_<F> forward(m, "ConvForward");
  forward.def(py::init<>()) VALUE(F, dtype) VALUE(F, rows) VALUE(F, in_channels) VALUE(F, out_channels) VALUE(F, relu)
      VALUE(F, height) VALUE(F, width);
  ADDRESS(forward, F, x), ADDRESS(forward, F, weight), ADDRESS(forward, F, scale), ADDRESS(forward, F, shift);
  ADDRESS(forward, F, residual), ADDRESS(forward, F, residual_scale), ADDRESS(forward, F, residual_shift);
  ADDRESS(forward, F, y), ADDRESS(forward, F, bias), ADDRESS(forward, F, in_scale), ADDRESS(forward, F, in_shift);
  ADDRESS(forward, F, mask), ADDRESS(forward, F, mean), ADDRESS(forward, F, var);
  using I = Conv1x1BackwardInput;
  py::class_<I> input(m, "Conv1x1BackwardInput");
  input.def(py::init<>()) VALUE(I, dtype) VALUE(I, rows) VALUE(I, in_channels) VALUE(I, out_channels) VALUE(I, relu)
      VALUE(I, grads);
  ADDRESS(input, I, dy), ADDRESS(input, I, c), ADDRESS(input, I, scale), ADDRESS(input, I, shift);
  ADDRESS(input, I, weight), ADDRESS(input, I, shortcut_dy), ADDRESS(input, I, mask), ADDRESS(input, I, dx);
  ADDRESS(input, I, dc);
  using J = Conv3x3BnBackwardInput;
  py::class_<J, I>(m, "Conv3x3BnBackwardInput").def(py::init<>()) VALUE(J, height) VALUE(J, width);
  using W = Conv1x1BackwardWeight;
  py::class_<W> weight(m, "Conv1x1BackwardWeight");
  weight.def(py::init<>()) VALUE(W, dtype) VALUE(W, rows) VALUE(W, in_channels) VALUE(W, out_channels);
  ADDRESS(weight, W, dy), ADDRESS(weight, W, mask), ADDRESS(weight, W, c), ADDRESS(weight, W, scale);
  ADDRESS(weight, W, shift), ADDRESS(weight, W, center), ADDRESS(weight, W, r), ADDRESS(weight, W, dbias);
  using G = Gram;
  py::class_<G> gram(m, "Gram");
  gram.def(py::init<>()) VALUE(G, dtype) VALUE(G, rows) VALUE(G, channels);
  ADDRESS(gram, G, c), ADDRESS(gram, G, scale), ADDRESS(gram, G, shift), ADDRESS(gram, G, m), ADDRESS(gram, G, S);
}

void bind_gram_form(py::module_& m) {
  using S = GramOutputStats;
  py::class_<S> stats(m, "GramOutputStats");
  stats.def(py::init<>()) VALUE(S, dtype) VALUE(S, in_channels) VALUE(S, out_channels);
  ADDRESS(stats, S, weight), ADDRESS(stats, S, bias), ADDRESS(stats, S, m), ADDRESS(stats, S, S);
  ADDRESS(stats, S, mean), ADDRESS(stats, S, var), ADDRESS(stats, S, center);
  using C = GramBackwardCoefficients;
  py::class_<C> coefficients(m, "GramBackwardCoefficients");
  coefficients.def(py::init<>()) VALUE(C, dtype) VALUE(C, rows) VALUE(C, in_channels) VALUE(C, out_channels);
  ADDRESS(coefficients, C, r), ADDRESS(coefficients, C, sum_dz), ADDRESS(coefficients, C, weight);
  ADDRESS(coefficients, C, bias), ADDRESS(coefficients, C, mean), ADDRESS(coefficients, C, invstd);
  ADDRESS(coefficients, C, scale), ADDRESS(coefficients, C, m), ADDRESS(coefficients, C, S);
  ADDRESS(coefficients, C, center), ADDRESS(coefficients, C, dweight), ADDRESS(coefficients, C, dW);
  ADDRESS(coefficients, C, weight_dz), ADDRESS(coefficients, C, weight_a), ADDRESS(coefficients, C, offset);
  using I = Conv1x1GramBackwardInput;
  py::class_<I> input(m, "Conv1x1GramBackwardInput");
  input.def(py::init<>()) VALUE(I, dtype) VALUE(I, rows) VALUE(I, in_channels) VALUE(I, out_channels);
  ADDRESS(input, I, dy), ADDRESS(input, I, mask), ADDRESS(input, I, c), ADDRESS(input, I, mean);
  ADDRESS(input, I, scale), ADDRESS(input, I, shift), ADDRESS(input, I, weight_dz), ADDRESS(input, I, weight_a);
  ADDRESS(input, I, center), ADDRESS(input, I, offset), ADDRESS(input, I, dz_below), ADDRESS(input, I, sum_dz);
  ADDRESS(input, I, sum_dz_centered);
}

template <class Args>
void launcher(py::module_& m, const char* name, cudaError_t (*launch)(const Args&, cudaStream_t)) {
  m.def(name, [launch](const Args& args) { return int(launch(args, nullptr)); });
}

template <class Args>
void launcher(py::module_& m, const char* name, cudaError_t (*launch)(const Args&, Workspace&, cudaStream_t)) {
  m.def(name, [launch](const Args& args, Workspace& workspace) { return int(launch(args, workspace, nullptr)); });
}

void bind_plans(py::module_& m) {
  py::class_<PacketPlan>(m, "PacketPlan")
      .def_readonly("packets", &PacketPlan::packets)
      .def_readonly("blocks", &PacketPlan::blocks)
      .def_readonly("threads", &PacketPlan::threads)
      .def_readonly("kept", &PacketPlan::kept)
      .def_readonly("fixed_channels", &PacketPlan::fixed_channels)
      .def("stride", &PacketPlan::stride)
      .def("first", &PacketPlan::first)
      .def("backwards", &PacketPlan::backwards)
      .def("first_channel", &PacketPlan::first_channel);
  m.def("plan_packets", [](int64_t numel, int64_t channels, int blocks, bool aligned, int multiprocessors) {
    return plan_packets({numel, channels, blocks, 2, aligned}, {multiprocessors, 50 << 20});
  });
  py::class_<TilePlan>(m, "TilePlan")
      .def_readonly("chunks", &TilePlan::chunks)
      .def_readonly("groups", &TilePlan::groups)
      .def_readonly("lanes", &TilePlan::lanes)
      .def_readonly("tile_rows", &TilePlan::tile_rows)
      .def_readonly("vector", &TilePlan::vector)
      .def_readonly("kept", &TilePlan::kept)
      .def("threads", &TilePlan::threads)
      .def("row_stride", &TilePlan::row_stride)
      .def("first_row", &TilePlan::first_row)
      .def("first_channel", &TilePlan::first_channel)
      .def("rows_of_thread", &TilePlan::rows_of_thread)
      .def("workspace_bytes", &TilePlan::workspace_bytes);
  m.def("plan_tiles", [](int64_t rows, int64_t channels, int vector, int unroll, int blocks, int multiprocessors) {
    return plan_tiles({rows, channels, vector, unroll, blocks, 2}, {multiprocessors, 50 << 20});
  });
  py::class_<ProductPlan>(m, "ProductPlan")
      .def_readonly("column_tiles", &ProductPlan::column_tiles)
      .def_readonly("row_tiles", &ProductPlan::row_tiles)
      .def_readonly("groups", &ProductPlan::groups)
      .def("steps", &ProductPlan::steps)
      .def("rows_of_tile", &ProductPlan::rows_of_tile)
      .def("rows_of_group", &ProductPlan::rows_of_group)
      .def("partial_of", &ProductPlan::partial_of)
      .def("workspace_bytes", &ProductPlan::workspace_bytes);
  py::class_<RowsPlan>(m, "RowsPlan")
      .def_readonly("tiles", &RowsPlan::tiles)
      .def_readonly("splits", &RowsPlan::splits)
      .def_readonly("rows_of_split", &RowsPlan::rows_of_split)
      .def("first_row", &RowsPlan::first_row)
      .def("rows_from", &RowsPlan::rows_from)
      .def("sums_of", &RowsPlan::sums_of)
      .def("products_of", &RowsPlan::products_of)
      .def("floats", &RowsPlan::floats)
      .def("place", [](const RowsPlan& plan, int64_t tile) {
        int right;
        const int left = plan.left_tile(tile, &right);
        return std::pair(left, right);
      });
  m.def("plan_rows", [](int64_t rows, int64_t left, int64_t right, bool upper, int multiprocessors) {
    return plan_rows(rows, left, right, upper, {multiprocessors, 50 << 20});
  });
  py::class_<HaloPlan>(m, "HaloPlan")
      .def_readonly("halves", &HaloPlan::halves)
      .def("places", &HaloPlan::places)
      .def("first_place", &HaloPlan::first_place)
      .def("first_row", &HaloPlan::first_row)
      .def("begin", &HaloPlan::begin)
      .def("end", &HaloPlan::end)
      .def("place_of", &HaloPlan::place_of)
      .def("taps_inside", &HaloPlan::taps_inside);
  m.def("halo_fits", halo_fits);
  m.def("plan_halo", plan_halo);
  m.attr("halo_places") = kHaloPlaces;
  m.def("plan_product", [](int64_t rows, int64_t columns, int64_t depth, int multiprocessors) {
    return plan_product(rows, columns, depth, {multiprocessors, 50 << 20});
  });
}

}  // namespace

PYBIND11_MODULE(fusedres_cuda_host, m) {
  bind_vectors(m);
  bind_lists(m);
  bind_bn(m);
  bind_stem(m);
  bind_convolutions(m);
  bind_gram_form(m);
  bind_plans(m);
  launcher(m, "bn_scale_shift", bn_scale_shift);
  launcher(m, "bn_backward_coefficients", bn_backward_coefficients);
  launcher(m, "bn_running_stats", bn_running_stats);
  launcher(m, "cast", cast);
  launcher(m, "bn_stats", bn_stats);
  launcher(m, "bn_add_relu_forward", bn_add_relu_forward);
  launcher(m, "bn_add_relu_backward_reduce", bn_add_relu_backward_reduce);
  launcher(m, "bn_add_relu_backward_input", bn_add_relu_backward_input);
  launcher(m, "relu_backward", relu_backward);
  launcher(m, "bn_relu_maxpool_forward", bn_relu_maxpool_forward);
  launcher(m, "bn_relu_maxpool_backward_reduce", bn_relu_maxpool_backward_reduce);
  launcher(m, "bn_relu_maxpool_backward_input", bn_relu_maxpool_backward_input);
  launcher(m, "conv1x1_forward", conv1x1_forward);
  launcher(m, "conv1x1_backward_input", conv1x1_backward_input);
  launcher(m, "conv1x1_backward_weight", conv1x1_backward_weight);
  launcher(m, "gram", gram);
  launcher(m, "gram_output_stats", gram_output_stats);
  launcher(m, "gram_backward_coefficients", gram_backward_coefficients);
  launcher(m, "conv1x1_gram_backward_input", conv1x1_gram_backward_input);
  m.def("conv1x1_backward_weight_workspace", conv1x1_backward_weight_workspace);
  m.def("gram_workspace", gram_workspace);
  m.def("gram_output_stats_workspace", gram_output_stats_workspace);
  m.def("gram_backward_coefficients_workspace", gram_backward_coefficients_workspace);
  m.def("conv1x1_gram_backward_input_workspace", conv1x1_gram_backward_input_workspace);
  launcher(m, "conv3x3_forward", conv3x3_forward);
  launcher(m, "conv3x3_backward_input", conv3x3_backward_input);
  for (const char* op : {"conv1x1_forward_workspace", "conv3x3_forward_workspace"}) m.def(op, conv_forward_workspace);
  m.def("bn_stats_workspace", bn_stats_workspace);
  m.def("bn_add_relu_backward_reduce_workspace", bn_add_relu_backward_reduce_workspace);
  m.def("bn_relu_maxpool_backward_reduce_workspace", bn_relu_maxpool_backward_reduce_workspace);
  m.def("seed", [](unsigned seed) { fusedres::emulator::state().random.seed(seed); });
  m.def("set_device",
        [](int multiprocessors, int l2_bytes) { fusedres::emulator::state().device = {multiprocessors, l2_bytes}; });
  m.def("run_only_blocks", [](std::vector<unsigned> blocks) { fusedres::emulator::state().only_blocks = blocks; });
  m.def("kernels_launched", [] { return fusedres::emulator::state().launched.size(); });
}
