// Python's view of linear solves and of the eigenpairs of diagonal blocks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../krylov/block_cg.h"
#include "../krylov/slice_lanczos.h"
#include "python_space.h"

namespace py = pybind11;

namespace flatcore {
namespace {

const char* status_name(krylov::SolveStatus status) {
    switch (status) {
    case krylov::SolveStatus::converged:
        return "converged";
    case krylov::SolveStatus::out_of_products:
        return "out_of_products";
    case krylov::SolveStatus::singular:
        return "singular";
    }
    return "unknown";
}

py::dict conjugate_gradients(const py::function& product, const at::Tensor& B, double damping, double tol,
                             int64_t max_products) {
    EstimatorSpace space = python_space(product, B, B.size(1), 0);
    krylov::SolveResult<at::Tensor> result;
    {
        py::gil_scoped_release release;
        krylov::BlockCG<EstimatorSpace> solver(space, damping);
        result = solver.solve(B.clone(at::MemoryFormat::Contiguous), tol, max_products);
    }
    py::dict out;
    out["X"] = result.X;
    out["products"] = result.products;
    out["iterations"] = result.iterations;
    out["curvature"] = result.curvature;
    out["status"] = status_name(result.status);
    return out;
}

krylov::Which which_of(const std::string& name) {
    if (name == "LA") return krylov::Which::LA;
    if (name == "SA") return krylov::Which::SA;
    if (name == "BE") return krylov::Which::BE;
    return krylov::Which::LM;
}

py::list slice_pairs(const py::function& product, const at::Tensor& like, int64_t P,
                     const std::vector<std::pair<int64_t, int64_t>>& slices, int64_t k,
                     const std::string& which, double tol, int64_t width, int64_t steps, uint64_t seed,
                     const py::function& on_step) {
    EstimatorSpace space = python_space(product, like, P, seed);
    std::vector<krylov::SlicePairs<at::Tensor>> results;
    {
        py::gil_scoped_release release;
        krylov::SliceLanczos<EstimatorSpace> lanczos(space, slices, {k, which_of(which), tol, width, steps});
        results = lanczos.solve([&on_step](int64_t products, int64_t done) {
            py::gil_scoped_acquire acquire;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            on_step(products, done);
        });
    }
    py::list out;
    for (const auto& pairs : results) {
        py::dict one;
        one["values"] = pairs.values;
        one["vectors"] = pairs.vectors;
        one["residuals"] = pairs.residuals;
        one["scale"] = pairs.scale;
        one["rounding"] = pairs.rounding;
        one["products"] = pairs.products;
        out.append(one);
    }
    return out;
}

}  // namespace

void bind_solvers(py::module_ module) {
    py::module_ m = module.def_submodule("solvers", "Block conjugate gradients, Lanczos in slices.");
    m.def("conjugate_gradients", &conjugate_gradients, py::arg("product"), py::arg("B"), py::arg("damping"),
          py::arg("tol"), py::arg("max_products"));
    m.def("slice_pairs", &slice_pairs, py::arg("product"), py::arg("like"), py::arg("P"), py::arg("slices"),
          py::arg("k"), py::arg("which"), py::arg("tol"), py::arg("width"), py::arg("steps"), py::arg("seed"),
          py::arg("on_step"));
}

}  // namespace flatcore
