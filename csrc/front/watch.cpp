// Whether the modules of a patched block are as fusedres/patching/watch.py found them, and their tensors: what is
// looked at in every call, and would take Python as long as a kernel or two.
#include "watch.h"

#include <array>
#include <cstddef>

namespace fusedres::front {

namespace {

using python::kPython;
using python::none;
using python::Object;
using python::Reference;
using python::Tuple;

constexpr ssize_t kMostModules = 32;
constexpr ssize_t kBuffersOfNorm = 3;

// The objects of a pair of watch.py's: a tuple, and its objects' addresses, which are looked at one after the other.
Object* const* objects_of(Tuple pair) { return reinterpret_cast<Object* const*>(kPython.bytes(pair[1])); }

bool has_attribute(Object* owner, Object* name, Object* expected) {
  const Reference found(kPython.get_attribute(owner, name));
  return found.get() == expected;
}

// One reading of a block.
class Reading {
 public:
  explicit Reading(Tuple watch) : watch_(watch) {
    for (ssize_t i = 0; i < kSigns; ++i) signs_[size_t(i)] = watch.tuple(0)[i];
  }

  // A list of modules and tensors as the watch asks for them; None where anything is not as it was.
  Object* of(Object* block) {
    if (!roots_hold(block) || !functions_hold() || !modules_hold() || !flags_hold()) return none();
    const Tuple norms = watch_.tuple(4), reads = watch_.tuple(5);
    const ssize_t n = norms.size();
    Reference list(kPython.new_list(n + reads.size()));
    if (list.get() == nullptr) return none();
    for (ssize_t i = 0; i < n; ++i) put(list, i, modules_[size_t(norms.number(i))].get());
    for (ssize_t i = 0; i < reads.size(); ++i) {
      const Tuple read = reads.tuple(i);
      Object* const tensors = tensors_of(read);
      Object* const tensor = tensors == nullptr ? nullptr : kPython.item(tensors, read[2]);
      const bool is_absent = read[3] == kPython.true_object;
      if (tensor == nullptr || (is_absent ? tensor != kPython.none : !is_plain(tensor))) return none();
      put(list, n + i, tensor);
    }
    return list.given_away();
  }

 private:
  static void put(const Reference& list, ssize_t i, Object* borrowed) {
    kPython.inc_ref(borrowed);  // which the list takes
    kPython.put(list.get(), i, borrowed);
  }

  // The block itself, or of a model's stem the modules that it calls, which no attribute of the model may hide.
  bool roots_hold(Object* block) {
    const Tuple roots = watch_.tuple(7);
    if (roots.size() == 0) {
      modules_[size_t(count_++)].share(block);
      return true;
    }
    const Reference state(kPython.dict_of(block, nullptr));
    if (state.get() == nullptr) return false;
    Reference modules;
    if (Object* const found = kPython.item(state.get(), roots[0])) modules.share(found);
    if (modules.get() == nullptr || roots.size() > kMostModules) return false;
    for (ssize_t i = 1; i < roots.size(); ++i) {
      if (kPython.item(state.get(), roots[i]) != nullptr) return false;
      Object* const module = kPython.item(modules.get(), roots[i]);
      if (module == nullptr) return false;
      modules_[size_t(count_++)].share(module);
    }
    return true;
  }

  bool functions_hold() const {
    const Tuple functions = watch_.tuple(1);
    for (ssize_t i = 0; i < functions.size(); ++i) {
      const Tuple each = functions.tuple(i);
      if (!has_attribute(each[0], each[1], each[2])) return false;
    }
    return true;
  }

  bool flags_hold() const {
    const Tuple flags = watch_.tuple(3);
    for (ssize_t i = 0; i < flags.size(); ++i) {
      const Tuple each = flags.tuple(i);
      if (!has_attribute(modules_[size_t(each.number(0))].get(), each[1], each[2])) return false;
    }
    return true;
  }

  // The modules below follow in `modules_`, breadth first.
  bool modules_hold() {
    const Tuple modules = watch_.tuple(2);
    const ssize_t n = modules.size();
    if (n > kMostModules) return false;
    for (ssize_t i = 0; i < n; ++i) {
      if (i >= count_ || !holds(modules.tuple(i), size_t(i))) return false;
    }
    return count_ == n;
  }

  // module: its class, the keys of its attributes in their order, what is expected of each, and its children's names.
  bool holds(Tuple module, size_t place) {
    Object* object = modules_[place].get();
    const Reference type(kPython.type(object));
    if (type.get() != module[0]) return false;
    Reference& state = states_[place];
    state.set(kPython.dict_of(object, nullptr));
    if (state.get() == nullptr) return false;
    Object *const *const keys = objects_of(module.tuple(1)), *const *const expected = objects_of(module.tuple(2));
    const ssize_t n = module.tuple(1).tuple(0).size();
    if (kPython.dict_size(state.get()) != n) return false;
    ssize_t position = 0;
    Object *key, *value;
    for (ssize_t i = 0; kPython.next(state.get(), &position, &key, &value); ++i) {
      if (i >= n || key != keys[i] || !fits(expected[i], value, module.tuple(3), place)) return false;
    }
    return true;
  }

  bool fits(Object* expected, Object* value, Tuple children, size_t place) {
    if (value == expected || expected == signs_[kAny]) return true;
    if (expected == signs_[kEmpty]) {
      Reference held;  // while it says so
      held.share(value);
      return kPython.is_true(value) == 0;
    }
    if (expected == signs_[kParameters]) return keep(parameters_[place], value);
    if (expected == signs_[kBuffers]) {
      return kPython.dict_size(value) == kBuffersOfNorm && keep(buffers_[place], value);
    }
    return expected == signs_[kModules] && has_children(value, children);
  }

  static bool keep(Reference& place, Object* value) {
    __builtin_prefetch(value);
    place.share(value);
    return true;
  }

  bool has_children(Object* modules, Tuple names) {
    const ssize_t n = names.size();
    if (kPython.dict_size(modules) != n || count_ + n > kMostModules) return false;
    ssize_t position = 0;
    Object *key, *value;
    for (ssize_t i = 0; kPython.next(modules, &position, &key, &value); ++i) {
      if (i >= n || key != names[i]) return false;
      __builtin_prefetch(value);  // kernels have run since: nothing of a block is in the nearest cache
      modules_[size_t(count_++)].share(value);
    }
    return true;
  }

  // read: a module, whether a buffer is meant, a name, and whether it was None.
  Object* tensors_of(Tuple read) const {
    const size_t place = size_t(read.number(0));
    return read.number(1) == 0 ? parameters_[place].get() : buffers_[place].get();
  }

  bool is_plain(Object* tensor) const {
    const Reference type(kPython.type(tensor));
    const Tuple plain = watch_.tuple(6);
    for (ssize_t i = 0; i < plain.size(); ++i) {
      if (plain[i] == type.get()) return true;
    }
    return false;
  }

  enum Sign : ssize_t { kAny, kEmpty, kParameters, kBuffers, kModules, kSigns };

  Tuple watch_;
  std::array<Object*, kSigns> signs_;
  std::array<Reference, kMostModules> modules_, states_, parameters_, buffers_;
  ssize_t count_ = 0;
};

Object* read_by_python(Object*, Object* const* arguments, ssize_t) { return read(arguments[0], arguments[1]); }

}  // namespace

Object* read(Object* watch, Object* block) { return Reading(Tuple{watch}).of(block); }

}  // namespace fusedres::front

// A Python function, read(watch, block); null where this process has no Python, or hides its functions.
extern "C" __attribute__((visibility("default"))) fusedres::front::python::Object* fusedres_watch_reader() {
  using namespace fusedres::front;
  static python::Method method{"read", read_by_python, python::kFastCall, "What fusedres/patching/watch.py asks for."};
  return python::kPython.is_complete ? python::kPython.new_function(&method, nullptr, nullptr) : nullptr;
}
