// The Python module fastprefix._C.

#include <Python.h>

#include <ATen/Version.h>

#include "ops/built_for.h"

namespace {

PyObject* built_for(PyObject*, PyObject*) {
  return PyUnicode_FromString(fastprefix::built_for());
}

PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(at::get_cpu_capability().c_str());
}

PyMethodDef methods[] = {
    {"built_for", built_for, METH_NOARGS, "The version of torch that this was compiled against."},
    {"isa", isa, METH_NOARGS, "The instruction set that is used, by torch's name for it."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Compiled kernels.", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (!fastprefix::is_built_for_this_torch()) {
    return nullptr;
  }
  return PyModule_Create(&definition);
}
