// `replay` and `bundle_drop` as functions of Python's own. torch's dispatcher, which is asked past, takes as long to
// pass a pass's tensors as some kernels take to run.
#include <exception>

#include "recording.h"
#include "watch.h"

namespace fusedres::front {

namespace {

using python::kPython;
using python::none;
using python::Object;
using python::Reference;
using python::Tuple;
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

struct Asked {
  int64_t number, bundle;
  bool keeps;
  int64_t places;
};

// `behind`, and the results as `replay` gives them, in one tuple; null where torch's functions raised an error.
Object* replayed(Tuple torch, Object* inputs, const Asked& asked, std::initializer_list<Object*> behind) {
  std::vector<Tensor> tensors;
  if (!take(inputs, torch[0], tensors)) return nullptr;
  std::tuple<std::vector<Tensor>, int64_t> made;
  {
    const WithoutGil released;
    made = replay(asked.number, std::move(tensors), asked.bundle, asked.keeps, asked.places);
  }
  Reference list(list_of(std::get<0>(made), torch[1]));
  if (list.get() == nullptr) return nullptr;
  Object* const results = kPython.new_tuple(2 + ssize_t(behind.size()));
  kPython.put_in_tuple(results, 0, list.given_away());
  kPython.put_in_tuple(results, 1, kPython.new_number(std::get<1>(made)));
  ssize_t place = 2;
  for (Object* const object : behind) {
    kPython.inc_ref(object);  // which the tuple takes
    kPython.put_in_tuple(results, place++, object);
  }
  return results;
}

template <class Function>
Object* raised(Function run) {
  try {
    return run();
  } catch (const std::exception& error) {
    kPython.raise(*kPython.runtime_error, error.what());
    return nullptr;
  }
}

// self: capsules_of, tensors_of; arguments: of `replay`, but for places.
Object* replay_by_python(Object* self, Object* const* arguments, ssize_t) {
  return raised([&]() -> Object* {
    replay_begins();
    const Asked asked{kPython.number(arguments[0]), kPython.number(arguments[2]), arguments[3] == kPython.true_object,
                      0};
    return replayed(Tuple{self}, arguments[1], asked, {});
  });
}

// A bound call of a block, as fusedres/patching/bound.py describes it.
class BoundCall {
 public:
  explicit BoundCall(Tuple call) : call_(call), indices_(call.tuple(1)), count_(indices_.size()) {}

  // x and what the call takes out of `row`; null where these are not the tensors that they were, want gradients where
  // they wanted none, or have a sign, by torch's function `is_neg`, that its dispatcher would make true first; or where
  // a question raised an error.
  Object* inputs_of(Object* row, Object* x, Object* is_neg) const {
    Object* const* const expected = reinterpret_cast<Object* const*>(kPython.bytes(call_[2]));
    Reference inputs(kPython.new_list(1 + count_));
    put(inputs, 0, x);
    for (ssize_t i = 0; i < count_; ++i) {
      Object* const tensor = kPython.element(row, indices_.number(i));
      if (tensor != expected[i]) return nullptr;
      const Reference flag(kPython.call(is_neg, tensor));
      if (flag.get() == nullptr || flag.get() == kPython.true_object) return nullptr;
      put(inputs, 1 + i, tensor);
    }
    return wants_as_before(inputs.get()) ? inputs.given_away() : nullptr;
  }

  Asked asked(bool keeps) const { return {call_.number(3), 0, keeps, call_.number(4)}; }

 private:
  static void put(const Reference& list, ssize_t i, Object* borrowed) {
    kPython.inc_ref(borrowed);  // which the list takes
    kPython.put(list.get(), i, borrowed);
  }

  bool wants_as_before(Object* inputs) const {
    if (call_[5] == kPython.none) return true;
    bool wants = false;
    for (ssize_t i = 0; i <= count_ && !wants; ++i) {
      const Reference flag(kPython.get_attribute(kPython.element(inputs, i), call_[6]));
      if (flag.get() == nullptr) return false;  // and the error is the caller's
      wants = flag.get() == kPython.true_object;
    }
    return wants == (call_[5] == kPython.true_object);
  }

  Tuple call_, indices_;
  ssize_t count_;
};

// self: capsules_of, tensors_of, is_neg; arguments: the call, the block, x, keeps.
Object* replay_block_by_python(Object* self, Object* const* arguments, ssize_t) {
  return raised([&]() -> Object* {
    replay_begins();
    const BoundCall call(Tuple{arguments[0]});
    const Reference row(read(Tuple{arguments[0]}[0], arguments[1]));
    if (row.get() == nullptr || row.get() == kPython.none) return none();
    const Reference inputs(call.inputs_of(row.get(), arguments[2], kPython.at(self, 2)));
    if (inputs.get() == nullptr) return none();
    const bool keeps = arguments[3] == kPython.true_object;
    return replayed(Tuple{self}, inputs.get(), call.asked(keeps), {inputs.get(), row.get()});
  });
}

// arguments: of `bundle_drop`.
Object* drop_by_python(Object*, Object* const* arguments, ssize_t) {
  bundle_drop(kPython.number(arguments[0]));
  kPython.inc_ref(kPython.none);
  return kPython.none;
}

}  // namespace

}  // namespace fusedres::front

// replay(number, inputs, bundle, keeps) for Python; torch: a tuple of its functions that make capsules of tensors and
// tensors of capsules. Null where this process has no Python, or hides its functions.
extern "C" __attribute__((visibility("default"))) fusedres::front::python::Object* fusedres_replay_function(
    fusedres::front::python::Object* torch) {
  using namespace fusedres::front;
  static python::Method method{"replay", replay_by_python, python::kFastCall, "A recording's run."};
  return python::kPython.is_complete ? python::kPython.new_function(&method, torch, nullptr) : nullptr;
}

// replay_block(call, block, x, keeps) for Python: as `replay`, with the inputs and the list that the watch gave behind
// the results; None where the call is another. torch: with `is_neg` too. Null as above.
extern "C" __attribute__((visibility("default"))) fusedres::front::python::Object* fusedres_replay_block_function(
    fusedres::front::python::Object* torch) {
  using namespace fusedres::front;
  static python::Method method{"replay_block", replay_block_by_python, python::kFastCall, "A bound call of a block."};
  return python::kPython.is_complete ? python::kPython.new_function(&method, torch, nullptr) : nullptr;
}

// bundle_drop(number) for Python; null as above.
extern "C" __attribute__((visibility("default"))) fusedres::front::python::Object* fusedres_bundle_drop_function() {
  using namespace fusedres::front;
  static python::Method method{"bundle_drop", drop_by_python, python::kFastCall, "A bundle's end."};
  return python::kPython.is_complete ? python::kPython.new_function(&method, nullptr, nullptr) : nullptr;
}
