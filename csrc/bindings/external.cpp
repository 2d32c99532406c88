#include "external.h"

#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace flatcore {
namespace {

// Inside the engine autograd is switched off for the thread; a function that differentiates needs it.
c10::impl::LocalDispatchKeySet with_autograd() {
    c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
    return keys;
}

// What one call into Python stands under.
struct Entered {
    py::gil_scoped_acquire gil;
    c10::impl::ForceDispatchKeyGuard keys{with_autograd()};
};

py::object to_python(const at::Tensor& t) { return t.defined() ? py::cast(t) : py::none(); }

at::Tensor from_python(const py::handle& t) { return t.is_none() ? at::Tensor() : t.cast<at::Tensor>(); }

py::list to_python(const ExternalFunction::Tensors& tensors) {
    py::list list;
    for (const at::Tensor& t : tensors) list.append(to_python(t));
    return list;
}

class PythonFunction final : public ExternalFunction {
 public:
    explicit PythonFunction(py::object object)
        : object_(std::move(object)), flops_(object_.attr("flops").cast<double>()),
          workspace_(object_.attr("workspace").cast<int64_t>()) {}
    PythonFunction(const PythonFunction&) = delete;
    PythonFunction& operator=(const PythonFunction&) = delete;
    ~PythonFunction() override {
        const py::gil_scoped_acquire gil;
        object_ = py::object();
    }

    at::Tensor forward(const Tensors& x) const override {
        const Entered entered;
        return from_python(object_.attr("forward")(to_python(x)));
    }

    at::Tensor tangent(const Tensors& x, const Tensors& tx) const override {
        const Entered entered;
        return from_python(object_.attr("tangent")(to_python(x), to_python(tx)));
    }

    Tensors adjoint(const Tensors& x, const Tensors& tx, const at::Tensor& dy, const at::Tensor& tdy,
                    const std::vector<bool>& wants) const override {
        const Entered entered;
        const py::object results =
            object_.attr("adjoint")(to_python(x), to_python(tx), to_python(dy), to_python(tdy), wants);
        Tensors tdx;
        for (const py::handle& result : results) tdx.push_back(from_python(result));
        return tdx;
    }

    double flops() const override { return flops_; }
    int64_t workspace() const override { return workspace_; }

 private:
    py::object object_;
    double flops_;
    int64_t workspace_;
};

}  // namespace

std::shared_ptr<const ExternalFunction> python_function(py::object object) {
    return std::make_shared<PythonFunction>(std::move(object));
}

}  // namespace flatcore
