// `replay` and `bundle_drop` as functions of Python's own. torch's dispatcher, which is asked past, takes as long to
// pass a pass's tensors as some kernels take to run.
#include <exception>

#include "python.h"
#include "recording.h"

namespace fusedres::front {

namespace {

using python::kPython;
using python::Object;
using python::Reference;
using torch::stable::Tensor;

// The tensors of a list, through capsules of owned handles, as torch's function `capsules_of` makes them; false where
// it raised an error.
bool take(Object* list, Object* capsules_of, std::vector<Tensor>& tensors) {
  const Reference capsules(kPython.call(capsules_of, list));
  if (capsules.get() == nullptr) return false;
  const ssize_t n = kPython.list_size(capsules.get());
  tensors.reserve(size_t(n));
  for (ssize_t i = 0; i < n; ++i) {
    tensors.emplace_back(
        static_cast<AtenTensorHandle>(kPython.in_capsule(kPython.element(capsules.get(), i), nullptr)));
  }
  return true;
}

// A list of Python's tensors, of which torch's function `tensors_of` takes the handles over.
Object* list_of(const std::vector<Tensor>& tensors, Object* tensors_of) {
  const Reference capsules(kPython.new_list(ssize_t(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    AtenTensorHandle own;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensors[i].get(), &own));
    kPython.put(capsules.get(), ssize_t(i), kPython.new_capsule(own, nullptr, nullptr));
  }
  return kPython.call(tensors_of, capsules.get());
}

// Other threads run Python meanwhile.
class WithoutGil {
 public:
  WithoutGil() : state_(kPython.release()) {}
  ~WithoutGil() { kPython.acquire(state_); }

 private:
  void* state_;
};

// self: capsules_of, tensors_of; arguments: of `replay`.
Object* replay_by_python(Object* self, Object* const* arguments, ssize_t) {
  try {
    std::vector<Tensor> inputs;
    if (!take(arguments[1], kPython.at(self, 0), inputs)) return nullptr;
    const int64_t number = kPython.number(arguments[0]), bundle = kPython.number(arguments[2]);
    const int64_t places = kPython.number(arguments[4]);
    const bool keeps = arguments[3] == kPython.true_object;
    std::tuple<std::vector<Tensor>, int64_t> made;
    {
      const WithoutGil released;
      made = replay(number, std::move(inputs), bundle, keeps, places);
    }
    Reference list(list_of(std::get<0>(made), kPython.at(self, 1)));
    if (list.get() == nullptr) return nullptr;
    Object* const pair = kPython.new_tuple(2);
    kPython.put_in_tuple(pair, 0, list.given_away());
    kPython.put_in_tuple(pair, 1, kPython.new_number(std::get<1>(made)));
    return pair;
  } catch (const std::exception& error) {
    kPython.raise(*kPython.runtime_error, error.what());
    return nullptr;
  }
}

// arguments: of `bundle_drop`.
Object* drop_by_python(Object*, Object* const* arguments, ssize_t) {
  bundle_drop(kPython.number(arguments[0]));
  kPython.inc_ref(kPython.none);
  return kPython.none;
}

}  // namespace

}  // namespace fusedres::front

// replay(number, inputs, bundle, keeps, places) for Python; torch: a tuple of its functions that make capsules of
// tensors and tensors of capsules. Null where this process has no Python, or hides its functions.
extern "C" __attribute__((visibility("default"))) fusedres::front::python::Object* fusedres_replay_function(
    fusedres::front::python::Object* torch) {
  using namespace fusedres::front;
  static python::Method method{"replay", replay_by_python, python::kFastCall, "A recording's run."};
  return python::kPython.is_complete ? python::kPython.new_function(&method, torch, nullptr) : nullptr;
}

// bundle_drop(number) for Python; null as above.
extern "C" __attribute__((visibility("default"))) fusedres::front::python::Object* fusedres_bundle_drop_function() {
  using namespace fusedres::front;
  static python::Method method{"bundle_drop", drop_by_python, python::kFastCall, "A bundle's end."};
  return python::kPython.is_complete ? python::kPython.new_function(&method, nullptr, nullptr) : nullptr;
}
