// Python's view of the Krylov methods: the operator comes as a callable (p, P) -> (p, P), results leave as
// tensors.
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "../kernels/probes.h"
#include "../krylov/eigensolver.h"
#include "../krylov/probe_lanczos.h"
#include "tensor_space.h"

namespace py = pybind11;

namespace flatcore {
namespace {

// The GIL is held for the product alone; the recurrences run without it.
TensorSpace make_space(const py::function& product, const at::Tensor& like, uint64_t seed) {
    auto apply = [&product](const at::Tensor& X) {
        py::gil_scoped_acquire acquire;
        return product(X).cast<at::Tensor>();
    };
    return TensorSpace(std::move(apply), like.size(1), like.options(), seed);
}

// Between two steps: Ctrl-C ends the run, and Python may show progress.
template <class... Counts>
auto step_callback(const py::object& on_step) {
    return [&on_step](Counts... counts) {
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!on_step.is_none()) on_step(counts...);
    };
}

void check_rows(const char* name, const at::Tensor& X) {
    if (X.dim() != 2 || !X.is_contiguous() ||
        (X.scalar_type() != at::kFloat && X.scalar_type() != at::kDouble))
        throw py::value_error(std::string(name) + ": expected contiguous float32 or float64 rows (p, P)");
}

krylov::Which which_named(const std::string& name) {
    if (name == "LM") return krylov::Which::LM;
    if (name == "LA") return krylov::Which::LA;
    if (name == "SA") return krylov::Which::SA;
    if (name == "BE") return krylov::Which::BE;
    throw py::value_error("which: expected LM, LA, SA or BE, got '" + name + "'");
}

const char* status_name(krylov::EigenStatus status) {
    switch (status) {
    case krylov::EigenStatus::converged:
        return "converged";
    case krylov::EigenStatus::out_of_products:
        return "out_of_products";
    case krylov::EigenStatus::copies_not_checked:
        return "copies_not_checked";
    }
    return "unknown";
}

py::dict solve(const py::function& product, const at::Tensor& start, int64_t k, const std::string& which,
               double tol, int64_t block, int64_t capacity, int64_t max_products, uint64_t seed,
               const py::object& on_step) {
    check_rows("start", start);
    const krylov::EigenOptions options{k, which_named(which), tol, block, capacity, max_products};
    krylov::EigenResult<at::Tensor> result;
    {
        py::gil_scoped_release release;
        TensorSpace space = make_space(product, start, seed);
        krylov::EigenSolver<TensorSpace> solver(space, options, start);
        result = solver.solve(step_callback<int64_t, int64_t>(on_step));
    }
    py::dict out;
    out["values"] = result.values;
    out["vectors"] = result.vectors;
    out["residuals"] = result.residuals;
    out["scale"] = result.scale;
    out["products"] = result.products;
    out["steps"] = result.steps;
    out["restarts"] = result.restarts;
    out["status"] = status_name(result.status);
    return out;
}

// The factorisation itself, for tests: (V, T, C, Q) after each of `steps` steps, restarting to `keep` rows
// where > 0.
py::tuple factorise(const py::function& product, const at::Tensor& start, int64_t block, int64_t steps,
                    int64_t keep, uint64_t seed) {
    check_rows("start", start);
    at::Tensor V, Q;
    krylov::Matrix T, C;
    {
        py::gil_scoped_release release;
        TensorSpace space = make_space(product, start, seed);
        krylov::BlockLanczos<TensorSpace> lanczos(space, start, block, (steps + 2) * block);
        for (int64_t i = 0; i < steps && !lanczos.complete(); ++i) lanczos.step();
        if (keep > 0) {
            std::vector<int64_t> first(static_cast<size_t>(std::min(keep, lanczos.basis_rows())));
            for (size_t i = 0; i < first.size(); ++i) first[i] = static_cast<int64_t>(i);
            lanczos.restart(lanczos.ritz(), first);
            if (!lanczos.complete()) lanczos.step();
        }
        V = lanczos.basis();
        Q = lanczos.next_block();
        T = lanczos.projected();
        C = lanczos.coupling();
    }
    const TensorSpace exact({}, 0, at::TensorOptions(at::kDouble), 0);
    return py::make_tuple(V, exact.to_tensor(T), exact.to_tensor(C), Q);
}

py::tuple to_tuple(const krylov::Tridiagonals& found) {
    const TensorSpace exact({}, 0, at::TensorOptions(at::kDouble), 0);
    return py::make_tuple(exact.to_tensor(found.alpha), exact.to_tensor(found.beta), found.lengths,
                          found.applications);
}

// enough: None, or called as (alpha, beta, lengths, products) after the steps listed in `looks`; true ends
// the recurrence. Only the first so many columns of alpha and beta are filled by then.
py::tuple tridiagonalise(const py::function& product, const at::Tensor& start, int64_t steps,
                         const py::object& enough, const std::vector<int64_t>& looks) {
    check_rows("start", start);
    krylov::Tridiagonals result;
    {
        py::gil_scoped_release release;
        TensorSpace space = make_space(product, start, 0);
        const auto look = [&](const krylov::Tridiagonals& found, int64_t done) {
            py::gil_scoped_acquire acquire;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            if (enough.is_none() || std::find(looks.begin(), looks.end(), done) == looks.end()) return false;
            return enough(*to_tuple(found)).cast<bool>();
        };
        result = krylov::probe_lanczos(space, start.clone(), steps, look);
    }
    return to_tuple(result);
}

at::Tensor rademacher(uint64_t seed, int64_t first, int64_t K, int64_t P, const at::Tensor& like) {
    at::Tensor host = at::empty({K, P}, like.options().device(at::kCPU));
    py::gil_scoped_release release;
    if (host.scalar_type() == at::kFloat)
        rademacher_rows(seed, first, K, P, host.mutable_data_ptr<float>());
    else if (host.scalar_type() == at::kDouble)
        rademacher_rows(seed, first, K, P, host.mutable_data_ptr<double>());
    else
        throw py::value_error("like: expected float32 or float64");
    return host.to(like.options());
}

}  // namespace

void bind_krylov(py::module_ module) {
    py::module_ m =
        module.def_submodule("krylov", "Block Lanczos, Gauss quadrature by Lanczos, counter-based probes.");
    py::register_exception<krylov::OperatorError>(m, "OperatorError", PyExc_ValueError);
    m.def("solve", &solve, py::arg("product"), py::arg("start"), py::arg("k"), py::arg("which"),
          py::arg("tol"), py::arg("block"), py::arg("capacity"), py::arg("max_products"), py::arg("seed"),
          py::arg("on_step"));
    m.def("factorise", &factorise, py::arg("product"), py::arg("start"), py::arg("block"), py::arg("steps"),
          py::arg("keep"), py::arg("seed"));
    m.def("tridiagonalise", &tridiagonalise, py::arg("product"), py::arg("start"), py::arg("steps"),
          py::arg("enough") = py::none(), py::arg("looks") = std::vector<int64_t>());
    m.def("rademacher", &rademacher, py::arg("seed"), py::arg("first"), py::arg("K"), py::arg("P"),
          py::arg("like"));
}

}  // namespace flatcore
