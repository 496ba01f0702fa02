// Whether tensors still lie where they did, and are what they were like.
#include "places.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "forms.h"
#include "store.h"

namespace fusedres::front {

namespace {

using torch::stable::Tensor;
using Tensors = std::vector<std::optional<Tensor>>;

struct Place {
  const void* data;
  Form form;
};

using Places = std::vector<std::optional<Place>>;

Store<Places>& store() {
  static auto* found = new Store<Places>("list of tensors");
  return *found;
}

bool is_strided(const Tensor& t) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

bool is_at(const std::optional<Place>& place, const std::optional<Tensor>& t) {
  if (!place || !t) return !place && !t;
  return is_strided(*t) && t->const_data_ptr() == place->data && matches(place->form, *t);
}

// tensors: strided ones
int64_t places_add(Tensors tensors) {
  Places places;
  for (const auto& t : tensors) {
    places.push_back(t ? std::optional(Place{t->const_data_ptr(), form_of(*t)}) : std::nullopt);
  }
  return store().add(std::move(places));
}

void places_drop(int64_t number) { store().drop(number); }

bool places_hold(int64_t number, Tensors tensors) {
  const auto places = store().at(number);
  if (places->size() != tensors.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!is_at((*places)[i], tensors[i])) return false;
  }
  return true;
}

}  // namespace

bool lie_at(int64_t number, const std::vector<Tensor>& tensors, size_t first) {
  const auto places = store().at(number);
  if (places->size() + first != tensors.size()) return false;
  for (size_t i = 0; i < places->size(); ++i) {
    const std::optional<Place>& place = (*places)[i];
    const Tensor& t = tensors[first + i];
    if (!place || t.const_data_ptr() != place->data || !is_strided(t)) return false;
  }
  return true;
}

}  // namespace fusedres::front

// Below no key of autograd's: what these read has no gradient, and the calls stay short.
STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CompositeImplicitAutograd, m) {
  using namespace fusedres::front;
  m.impl("places_add", TORCH_BOX(&places_add));
  m.impl("places_drop", TORCH_BOX(&places_drop));
  m.impl("places_hold", TORCH_BOX(&places_hold));
}
