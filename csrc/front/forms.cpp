#include "forms.h"

#include <algorithm>

namespace fusedres::front {

namespace {

using torch::stable::Tensor;

// Of a tensor, apart from its sizes and strides.
struct Kind {
  int32_t dtype, device, device_index;
  bool aligned;
};

Kind kind_of(const Tensor& t) {
  Kind kind;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &kind.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &kind.device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &kind.device_index));
  kind.aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return kind;
}

}  // namespace

bool matches(const Form& form, const Tensor& t) {
  const size_t dims = form.sizes.size();
  if (t.dim() != int64_t(dims)) return false;
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  if (!std::equal(sizes, sizes + dims, form.sizes.begin())) return false;
  if (!std::equal(strides, strides + dims, form.strides.begin())) return false;
  const Kind kind = kind_of(t);
  return kind.dtype == form.dtype && kind.device == form.device && kind.device_index == form.device_index &&
         kind.aligned == form.aligned;
}

Form form_of(const Tensor& t) {
  const Kind kind = kind_of(t);
  Form form{kind.dtype, kind.device, kind.device_index, kind.aligned, {}, {}};
  for (int64_t i = 0; i < t.dim(); ++i) {
    form.sizes.push_back(t.size(i));
    form.strides.push_back(t.stride(i));
  }
  return form;
}

}  // namespace fusedres::front
