// The Python module fastprefix._C.
#include <Python.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>

#include <cstdlib>
#include <cstring>

#include "cpu/call.h"
#include "ops/built_for.h"
#include "ops/direct.h"
#include "ops/inputs.h"

namespace {

using fastprefix::Inputs;
using fastprefix::NUMBER_OF_ARGUMENTS;
using fastprefix::TRAINED;

// o and, where it is asked for, lse.
PyObject* run_forward(const Inputs& inputs, bool return_lse) {
  RECORD_FUNCTION("fastprefix::native_forward", c10::ArrayRef<const c10::IValue>{});  // for torch.profiler
  fastprefix::Prepared prepared;
  fastprefix::prepare(inputs, prepared);
  fastprefix::Call& call = prepared.call;
  at::Tensor o = fastprefix::empty_heads(inputs.q, call.H, call.S, call.E, inputs.q.scalar_type());
  at::Tensor lse;
  std::vector<float> unwanted;
  if (return_lse) {
    lse = at::detail::empty_cpu({call.B, call.H, call.S}, at::kFloat);
    call.lse = lse.mutable_data_ptr<float>();
  } else {
    unwanted.resize(call.B * call.H * call.S);
    call.lse = unwanted.data();
  }
  call.o = fastprefix::heads_of(o);
  {
    pybind11::gil_scoped_release released;
    fastprefix::forward(call);
  }
  if (!return_lse) return THPVariable_Wrap(std::move(o));
  PyObject* found = PyTuple_New(2);
  if (!found) return nullptr;
  PyTuple_SET_ITEM(found, 0, THPVariable_Wrap(std::move(o)));
  PyTuple_SET_ITEM(found, 1, THPVariable_Wrap(std::move(lse)));
  return found;
}

bool has(const char* function, Py_ssize_t number, Py_ssize_t wanted) {
  if (number != wanted) PyErr_Format(PyExc_TypeError, "%s: got %zd arguments, expected %zd", function, number, wanted);
  return number == wanted;
}

bool read(const char* function, PyObject* const* arguments, Inputs& inputs) {
  if (fastprefix::read_inputs(arguments, false, inputs)) return true;
  PyErr_Format(PyExc_TypeError, "%s: got an argument of another kind than tensors and numbers", function);
  return false;
}

// Whether `backend`, or for "auto" $FASTPREFIX_BACKEND, asks for these kernels by name, or `auto` was found to.
bool is_wanted(PyObject* backend, const Inputs& inputs) {
  const char* name = PyUnicode_Check(backend) ? PyUnicode_AsUTF8(backend) : nullptr;
  if (!name) {
    PyErr_Clear();
    return false;
  }
  if (std::strcmp(name, "auto") == 0)
    if (const char* overruled = std::getenv("FASTPREFIX_BACKEND")) name = overruled;
  if (std::strcmp(name, "native") == 0) return true;
  return std::strcmp(name, "auto") == 0 && fastprefix::is_remembered(inputs);
}

PyObject* attend(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  if (!has("attend", number, NUMBER_OF_ARGUMENTS + 2)) return nullptr;
  Inputs inputs;
  PyObject *backend = arguments[NUMBER_OF_ARGUMENTS], *return_lse = arguments[NUMBER_OF_ARGUMENTS + 1];
  const bool fits = fastprefix::read_inputs(arguments, true, inputs) && (return_lse == Py_True || return_lse == Py_False) &&
                    fastprefix::fits(inputs);
  if (!fits) Py_RETURN_NONE;
  if (!fastprefix::is_direct(inputs) || !is_wanted(backend, inputs)) Py_RETURN_TRUE;
  return run_forward(inputs, return_lse == Py_True);
  END_HANDLE_TH_ERRORS
}

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  Inputs inputs;
  if (!has("forward", number, NUMBER_OF_ARGUMENTS) || !read("forward", arguments, inputs)) return nullptr;
  return run_forward(inputs, true);
  END_HANDLE_TH_ERRORS
}

// After the inputs: o, lse, do and a bool for each gradient.
PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  Inputs inputs;
  if (!has("backward", number, NUMBER_OF_ARGUMENTS + 3 + TRAINED) || !read("backward", arguments, inputs)) return nullptr;
  PyObject* const* rest = arguments + NUMBER_OF_ARGUMENTS;
  for (int i = 0; i < 3; i++)
    if (!THPVariable_Check(rest[i])) {
      PyErr_SetString(PyExc_TypeError, "backward: o, lse and do must be tensors");
      return nullptr;
    }
  const at::Tensor o = fastprefix::with_values(THPVariable_Unpack(rest[0]));
  const at::Tensor lse = fastprefix::with_values(THPVariable_Unpack(rest[1]));
  const at::Tensor dout = fastprefix::with_values(THPVariable_Unpack(rest[2]));
  bool needs[TRAINED];
  for (int i = 0; i < TRAINED; i++) needs[i] = PyObject_IsTrue(rest[3 + i]) == 1;
  std::vector<at::Tensor> found;
  {
    pybind11::gil_scoped_release released;
    found = fastprefix::gradients(inputs, o, lse, dout, needs);
  }
  PyObject* result = PyTuple_New(TRAINED);
  if (!result) return nullptr;
  for (int i = 0; i < TRAINED; i++) PyTuple_SET_ITEM(result, i, THPVariable_Wrap(found[i]));  // None where undefined
  return result;
  END_HANDLE_TH_ERRORS
}

PyObject* remember(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  if (!has("remember", number, NUMBER_OF_ARGUMENTS)) return nullptr;
  Inputs inputs;
  if (fastprefix::read_inputs(arguments, false, inputs)) fastprefix::remember(inputs);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  fastprefix::forget();
  Py_RETURN_NONE;
}

PyObject* built_for(PyObject*, PyObject*) { return PyUnicode_FromString(fastprefix::built_for()); }

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(fastprefix::instruction_set()); }

template <typename F>
PyCFunction as_method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"attend", as_method(attend), METH_FASTCALL, "o, or o and lse, of a call that only the kernels need to see; True for another that is right, else None."},
    {"forward", as_method(forward), METH_FASTCALL, "o and lse of a call that was checked."},
    {"backward", as_method(backward), METH_FASTCALL, "The gradients of q, k, v, prefix_k, prefix_v and prefix_bias, None where not needed."},
    {"remember", as_method(remember), METH_FASTCALL, "Let `attend` take calls like this one for the backend auto."},
    {"forget", forget, METH_NOARGS, "Undo every `remember`."},
    {"built_for", built_for, METH_NOARGS, "The version of torch that this was compiled against."},
    {"instruction_set", instruction_set, METH_NOARGS, "avx512, avx2 or baseline: the vectors that the kernels use."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Compiled kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (!fastprefix::is_built_for_this_torch()) return nullptr;
  return PyModule_Create(&definition);
}
