// The running statistics of BNs, moved by those of a batch.
#include <string>
#include <vector>

#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

using Tensors = std::vector<Tensor>;

void check_count(const char* op, const char* name, size_t found, size_t needed) {
  if (found == needed) return;
  fail(op, name, std::to_string(found) + " long", std::to_string(needed), "pass one for each norm");
}

// norms: how many. Counters are one for each norm, or none.
template <class Device>
void bn_running_stats_(Tensors running_mean, Tensors running_var, Tensors counters, Tensors mean, Tensors var,
                       std::vector<double> keep, std::vector<double> weight, std::vector<double> unbiased) {
  const char* op = "bn_running_stats_";
  const size_t norms = running_mean.size();
  for (const auto& [name, found] :
       {std::pair("running_var", running_var.size()), std::pair("mean", mean.size()), std::pair("var", var.size()),
        std::pair("keep", keep.size()), std::pair("weight", weight.size()), std::pair("unbiased", unbiased.size()),
        std::pair("counters", counters.empty() ? norms : counters.size())}) {
    check_count(op, name, found, norms);
  }
  if (norms == 0) return;
  check_device(op, "running_mean", running_mean[0], Device::kCuda);
  for (size_t first = 0; first < norms; first += BnRunningStats::kMost) {
    BnRunningStats args{};
    for (size_t i = first; i < norms && args.count < BnRunningStats::kMost; ++i) {
      const int64_t channels = running_mean[i].numel();
      check_vector(op, "running_mean", running_mean[i], channels);
      check_vector(op, "running_var", running_var[i], channels);
      check_vector(op, "mean", mean[i], channels);
      check_vector(op, "var", var[i], channels);
      if (!counters.empty() && (counters[i].scalar_type() != ScalarType::Long || counters[i].numel() != 1)) {
        fail(op, "counters", dtype_name(counters[i].scalar_type()) + " " + sizes_of(counters[i]), "int64 []",
             "pass num_batches_tracked");
      }
      const Device on(
          op, running_mean[0],
          {Named("running_mean", running_mean[i]), Named("running_var", running_var[i]), Named("mean", mean[i]),
           Named("var", var[i]), Named("counters", counters.empty() ? mean[i] : counters[i])});
      args.norms[args.count++] = {channels,
                                  data(mean[i]),
                                  data(var[i]),
                                  written(running_mean[i]),
                                  written(running_var[i]),
                                  counters.empty() ? nullptr : counters[i].mutable_data_ptr<int64_t>(),
                                  float(keep[i]),
                                  float(weight[i]),
                                  float(unbiased[i])};
    }
    Device(op, running_mean[0]).launch(args);
  }
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) { m.impl<&fusedres::front::bn_running_stats_<fusedres::front::Cpu>>("bn_running_stats_"); }

#ifdef USE_CUDA
FUSEDRES_OPS(CUDA, m) { m.impl<&fusedres::front::bn_running_stats_<fusedres::front::Cuda>>("bn_running_stats_"); }
#endif
