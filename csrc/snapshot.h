// What Python objects were like, to be asked cheaply whether they still are.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace fastvit {

// The classes, methods and attributes of objects, and the contents of those attributes that are dictionaries of the
// names given. Values are compared by identity. Objects are remembered by weak references, so that none lives longer.
class Snapshot {
 public:
  Snapshot(const pybind11::iterable& objects, const pybind11::iterable& dictionaries);

  // Whether nothing was set, added, removed or replaced since.
  bool holds() const;

 private:
  struct Value {
    PyObject* key;  // alive as long as the dictionary has it, which is asked first
    PyObject* value;
    pybind11::object kept;  // the value where nothing can refer to it weakly, but for containers
    pybind11::weakref weak;
  };
  using Values = std::vector<Value>;
  struct Object {
    pybind11::weakref object;
    pybind11::object type;
    unsigned int version;  // of the class, changed by any change of its methods or its bases' methods
    Values attributes;
    std::vector<std::pair<size_t, Values>> dictionaries;  // by the place of the attribute
  };

  static Values take(PyObject* dictionary);
  static bool same(const Values& values, PyObject* dictionary);

  std::vector<Object> objects_;
};

}  // namespace fastvit
