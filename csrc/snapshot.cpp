#include "snapshot.h"

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace fastvit {
namespace {

// What a weak reference refers to, borrowed; null where it is gone. Somebody else must hold it.
PyObject* referent(const py::weakref& weak) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(weak.ptr(), &object) < 0) throw py::error_already_set();
  Py_XDECREF(object);
  return object;
#else
  PyObject* object = PyWeakref_GetObject(weak.ptr());
  return object == Py_None ? nullptr : object;
#endif
}

// 0 where the class has none.
unsigned int version_of(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030B0000
  if (!PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
  return type->tp_version_tag;
}

py::object attributes_of(PyObject* object) {
  return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
}

}  // namespace

Snapshot::Snapshot(const py::iterable& objects, const py::iterable& dictionaries) {
  for (py::handle object : objects) {
    PyTypeObject* type = Py_TYPE(object.ptr());
    py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__call__", py::none());  // gives it a version
    const py::object attributes = attributes_of(object.ptr());
    if (!attributes) throw py::error_already_set();
    Object taken{py::weakref(object),
                 py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type)),
                 version_of(type),
                 take(attributes.ptr()),
                 {}};
    for (size_t i = 0; i < taken.attributes.size(); ++i) {
      const Value& value = taken.attributes[i];
      const py::handle key(value.key);
      if (!PyDict_Check(value.value)) continue;
      if (std::any_of(dictionaries.begin(), dictionaries.end(), [&](py::handle name) { return key.equal(name); })) {
        taken.dictionaries.emplace_back(i, take(value.value));
      }
    }
    objects_.push_back(std::move(taken));
  }
}

Snapshot::Values Snapshot::take(PyObject* dictionary) {
  Values values;
  Py_ssize_t at = 0;
  for (PyObject *key, *value; PyDict_Next(dictionary, &at, &key, &value);) {
    Value taken{key, value, {}, {}};
    if (PyType_SUPPORTS_WEAKREFS(Py_TYPE(value))) {
      taken.weak = py::weakref(value);
    } else if (!PyDict_Check(value) && !PyList_Check(value) && !PySet_Check(value)) {
      taken.kept = py::reinterpret_borrow<py::object>(value);
    }
    values.push_back(std::move(taken));
  }
  return values;
}

bool Snapshot::same(const Values& values, PyObject* dictionary) {
  if (static_cast<size_t>(PyDict_Size(dictionary)) != values.size()) return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (const Value& expected : values) {
    if (!PyDict_Next(dictionary, &at, &key, &value) || key != expected.key || value != expected.value) return false;
    // Another object may have come to lie where the first one was.
    if (expected.weak && referent(expected.weak) != value) return false;
  }
  return true;
}

bool Snapshot::holds() const {
  for (const Object& expected : objects_) {
    PyObject* object = referent(expected.object);
    if (object == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(object)) != expected.type.ptr()) return false;
    if (expected.version == 0 || version_of(Py_TYPE(object)) != expected.version) return false;
    const py::object attributes = attributes_of(object);
    if (!attributes) throw py::error_already_set();
    if (!same(expected.attributes, attributes.ptr())) return false;
    for (const auto& [place, values] : expected.dictionaries) {
      if (!same(values, expected.attributes[place].value)) return false;
    }
  }
  return true;
}

}  // namespace fastvit
