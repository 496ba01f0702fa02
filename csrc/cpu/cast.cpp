// Tensors in another dtype: the launcher.
#include "split.h"

namespace fusedres::cpu {

void cast(const Cast& args) {
  for (const Cast::Flat* flat = args.tensors; flat != args.tensors + args.count; ++flat) {
    const CastArgs all{args.from, args.to, flat->from, flat->to};
    parallel_chunks(count_chunks(flat->numel, 1), flat->numel,
                    [&](int64_t, int64_t begin, int64_t end) { kernels()->cast(all, begin, end); });
  }
}

}  // namespace fusedres::cpu
