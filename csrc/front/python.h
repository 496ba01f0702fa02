// The part of Python's stable ABI that this library calls, found at run time: the library loads where there is no
// Python, and under every Python that has these functions.
#pragma once

#include <dlfcn.h>
#include <sys/types.h>

#include <type_traits>

namespace fusedres::front::python {

struct Object;  // PyObject; nobody here looks into one

using FastFunction = Object* (*)(Object* self, Object* const* arguments, ssize_t count);
constexpr int kFastCall = 0x80;  // METH_FASTCALL

// PyMethodDef
struct Method {
  const char* name;
  FastFunction function;
  int flags;
  const char* doc;
};

// What `at`, `element`, `item` and `next` give belongs to the tuple, list or dict; all others give an own reference.
// `put` and `put_in_tuple` take one.
struct Api {
  void (*inc_ref)(Object*);
  void (*dec_ref)(Object*);
  Object* (*type)(Object*);
  Object* (*dict_of)(Object*, void*);
  Object* (*get_attribute)(Object*, Object*);
  int (*is_true)(Object*);
  ssize_t (*tuple_size)(Object*);
  Object* (*at)(Object*, ssize_t);
  ssize_t (*dict_size)(Object*);
  Object* (*item)(Object*, Object*);
  int (*next)(Object*, ssize_t*, Object**, Object**);
  Object* (*new_list)(ssize_t);
  int (*put)(Object*, ssize_t, Object*);
  ssize_t (*number)(Object*);
  char* (*bytes)(Object*);
  ssize_t (*list_size)(Object*);
  Object* (*element)(Object*, ssize_t);
  Object* (*new_tuple)(ssize_t);
  int (*put_in_tuple)(Object*, ssize_t, Object*);
  Object* (*new_number)(long long);
  Object* (*new_capsule)(void*, const char*, void (*)(Object*));
  void* (*in_capsule)(Object*, const char*);
  Object* (*call)(Object*, Object*);
  void* (*release)();
  void (*acquire)(void*);
  void (*raise)(Object*, const char*);
  Object* (*has_error)();
  int (*error_is)(Object*);
  void (*clear_error)();
  Object* (*new_function)(Method*, Object*, Object*);
  Object *none, *true_object;
  Object **runtime_error, **exception;
  bool is_complete;
};

inline Api find() {
  Api api{};
  api.is_complete = true;
  const auto look_up = [&](auto& place, const char* name) {
    void* symbol = dlsym(RTLD_DEFAULT, name);
    place = reinterpret_cast<std::decay_t<decltype(place)>>(symbol);
    api.is_complete = api.is_complete && symbol != nullptr;
  };
  look_up(api.inc_ref, "Py_IncRef");
  look_up(api.dec_ref, "Py_DecRef");
  look_up(api.type, "PyObject_Type");
  look_up(api.dict_of, "PyObject_GenericGetDict");
  look_up(api.get_attribute, "PyObject_GetAttr");
  look_up(api.is_true, "PyObject_IsTrue");
  look_up(api.tuple_size, "PyTuple_Size");
  look_up(api.at, "PyTuple_GetItem");
  look_up(api.dict_size, "PyDict_Size");
  look_up(api.item, "PyDict_GetItemWithError");
  look_up(api.next, "PyDict_Next");
  look_up(api.new_list, "PyList_New");
  look_up(api.put, "PyList_SetItem");
  look_up(api.number, "PyLong_AsSsize_t");
  look_up(api.bytes, "PyBytes_AsString");
  look_up(api.list_size, "PyList_Size");
  look_up(api.element, "PyList_GetItem");
  look_up(api.new_tuple, "PyTuple_New");
  look_up(api.put_in_tuple, "PyTuple_SetItem");
  look_up(api.new_number, "PyLong_FromLongLong");
  look_up(api.new_capsule, "PyCapsule_New");
  look_up(api.in_capsule, "PyCapsule_GetPointer");
  look_up(api.call, "PyObject_CallOneArg");
  look_up(api.release, "PyEval_SaveThread");
  look_up(api.acquire, "PyEval_RestoreThread");
  look_up(api.raise, "PyErr_SetString");
  look_up(api.runtime_error, "PyExc_RuntimeError");
  look_up(api.has_error, "PyErr_Occurred");
  look_up(api.error_is, "PyErr_ExceptionMatches");
  look_up(api.exception, "PyExc_Exception");
  look_up(api.clear_error, "PyErr_Clear");
  look_up(api.new_function, "PyCFunction_NewEx");
  look_up(api.none, "_Py_NoneStruct");
  look_up(api.true_object, "_Py_TrueStruct");
  return api;
}

// As the library is loaded: a question to every call's guard would take as long as what it guards.
inline const Api kPython = find();

// One that is owned.
class Reference {
 public:
  Reference() = default;
  explicit Reference(Object* own) : object_(own) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { set(nullptr); }

  void set(Object* own) {
    if (object_ != nullptr) kPython.dec_ref(object_);
    object_ = own;
  }
  void share(Object* borrowed) {
    kPython.inc_ref(borrowed);
    set(borrowed);
  }
  Object* get() const { return object_; }
  // For whoever takes it.
  Object* given_away() {
    Object* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  Object* object_ = nullptr;
};

// One that is a tuple; what it gives belongs to it.
struct Tuple {
  Object* object;

  ssize_t size() const { return kPython.tuple_size(object); }
  Object* operator[](ssize_t i) const { return kPython.at(object, i); }
  Tuple tuple(ssize_t i) const { return {(*this)[i]}; }
  ssize_t number(ssize_t i) const { return kPython.number((*this)[i]); }
};

// None, for a caller that is to ask in its own way: whatever error a question raised is dropped. An interrupt is the
// caller's, and then this is null.
inline Object* none() {
  if (kPython.has_error() != nullptr && kPython.error_is(*kPython.exception) == 0) return nullptr;
  kPython.clear_error();
  kPython.inc_ref(kPython.none);
  return kPython.none;
}

}  // namespace fusedres::front::python
