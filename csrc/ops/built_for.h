// The torch that this extension was compiled against, and the refusal of any other.

#pragma once

#include <Python.h>

#include <cstring>

#ifndef FASTPREFIX_TORCH_VERSION
#error "setup.py defines FASTPREFIX_TORCH_VERSION, the version of the torch whose headers are used"
#endif

namespace fastprefix {

// fastprefix/_extension.py looks for these words in the file when it cannot be loaded at all.
inline constexpr char kBuiltFor[] = "fastprefix built for torch " FASTPREFIX_TORCH_VERSION;

// The bare version, which is the last word of kBuiltFor.
inline const char* built_for() {
  return std::strrchr(kBuiltFor, ' ') + 1;
}

// Nothing in torch's C++ is the same from one version to the next by promise. False, with an ImportError set, when the
// torch that is imported is not the one this was built for. PyInit__C calls it before anything of torch.
inline bool is_built_for_this_torch() {
  PyObject* torch = PyImport_ImportModule("torch");
  if (torch == nullptr) {
    return false;
  }
  PyObject* version = PyObject_GetAttrString(torch, "__version__");
  Py_DECREF(torch);
  PyObject* text = version == nullptr ? nullptr : PyObject_Str(version);
  Py_XDECREF(version);
  const char* found = text == nullptr ? nullptr : PyUnicode_AsUTF8(text);
  const bool same = found != nullptr && std::strcmp(found, built_for()) == 0;
  if (found != nullptr && !same) {
    PyErr_Format(
        PyExc_ImportError,
        "built for torch %s, found %s: install fastprefix again with pip install --no-build-isolation",
        built_for(),
        found);
  }
  Py_XDECREF(text);
  return same;
}

}  // namespace fastprefix
