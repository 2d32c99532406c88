// What is looked at before every product for a change since the last: versions of tensors, the modules of a
// model and their modes, values of parameters. In C++ because a product of a small net takes less time than
// the same in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <unordered_set>

#include "engine/comparison.h"

namespace py = pybind11;

namespace flatcore {
namespace {

// Numbers one after another; equal where all are.
class Trace {
 public:
    void add(uint64_t number) { bytes_.append(reinterpret_cast<const char*>(&number), sizeof number); }
    // Changes when a tensor is changed in place or given new storage.
    void add(const at::Tensor& tensor) {
        add(reinterpret_cast<uintptr_t>(tensor.has_storage() ? tensor.const_data_ptr()
                                                             : tensor.unsafeGetTensorImpl()));
        add(tensor.is_inference() ? ~uint64_t{0} : static_cast<uint64_t>(tensor._version()));
    }
    void add_object(PyObject* object) {
        if (THPVariable_Check(object))
            add(THPVariable_Unpack(object));
        else
            add(reinterpret_cast<uintptr_t>(object));
    }
    py::bytes result() const { return bytes_; }

 private:
    std::string bytes_;
};

// The values of a dictionary, such as the modules' own are; of any other mapping by its method.
template <class Body>
void for_each_value(const py::object& mapping, const Body& body) {
    if (PyDict_CheckExact(mapping.ptr())) {
        PyObject *key = nullptr, *value = nullptr;
        for (Py_ssize_t at = 0; PyDict_Next(mapping.ptr(), &at, &key, &value);)
            if (value != Py_None) body(value);
        return;
    }
    for (const py::handle value : mapping.attr("values")())
        if (!value.is_none()) body(value.ptr());
}

// Those of a model and of all modules in it, each once.
struct ModuleTraces {
    Trace &parameters, &buffers, &modules;
    std::unordered_set<PyObject*> seen = {};

    void visit(PyObject* module) {
        if (!seen.insert(module).second) return;
        const auto owner = py::reinterpret_borrow<py::object>(module);
        modules.add(reinterpret_cast<uintptr_t>(module));
        modules.add(owner.attr("training").cast<bool>());
        for_each_value(owner.attr("_parameters"), [&](PyObject* one) { parameters.add_object(one); });
        for_each_value(owner.attr("_buffers"), [&](PyObject* one) { buffers.add_object(one); });
        for_each_value(owner.attr("_modules"), [&](PyObject* child) { visit(child); });
    }
};

py::bytes versions(const py::iterable& tensors) {
    Trace trace;
    for (const py::handle tensor : tensors) trace.add_object(tensor.ptr());
    return trace.result();
}

py::tuple of_modules(const py::object& model, const py::object& loss) {
    Trace parameters, surroundings, modules;
    ModuleTraces{parameters, surroundings, modules}.visit(model.ptr());
    if (!loss.is_none()) ModuleTraces{surroundings, surroundings, modules}.visit(loss.ptr());
    return py::make_tuple(parameters.result(), surroundings.result(), modules.result());
}

}  // namespace

void bind_changes(py::module_ m) {
    auto changes = m.def_submodule("changes", "What may have changed since the last product.");
    changes.def("versions", &versions, py::arg("tensors"),
                "Changes when one of the tensors is changed in place or given new storage.");
    changes.def(
        "of_modules", &of_modules, py::arg("model"), py::arg("loss"),
        "Versions of the model's parameters; of its buffers and of the loss's tensors, where it is a module; "
        "which modules there are, and their modes.");
    py::class_<Comparison>(changes, "Comparison",
                           "Of tensors with copies of them; on a GPU begun here, and waited for by `equal`.")
        .def(py::init<const std::vector<at::Tensor>&, const std::vector<at::Tensor>&>(), py::arg("before"),
             py::arg("now"), py::call_guard<py::gil_scoped_release>())
        .def("equal", &Comparison::equal, py::call_guard<py::gil_scoped_release>());
}

}  // namespace flatcore
