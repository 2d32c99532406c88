// Python's view of the Krylov methods: the operator comes as a callable (p, P) -> (p, P), results leave as
// tensors.
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "../krylov/block_lanczos.h"
#include "../krylov/probe_lanczos.h"
#include "products.h"
#include "random_rows.h"
#include "tall_rows.h"

namespace py = pybind11;

namespace flatcore {
namespace {

// The factorisation itself, for tests: (V, T, C, Q, slack) after `steps` steps, restarting to `keep` rows
// where > 0, of which the first `lock` are locked.
py::tuple factorise(const py::function& product, const at::Tensor& head, const at::Tensor& tail, double scale,
                    int64_t block, int64_t steps, int64_t keep, int64_t lock, uint64_t seed) {
    check_rows("head", head);
    at::Tensor V, Q;
    krylov::Factorisation s;
    TensorSpace space = make_space(product, head.size(1), head.options(), seed);
    {
        py::gil_scoped_release release;
        const TensorBasis basis(head, tail, scale);
        const double asymmetry = std::max(std::sqrt(space.epsilon()), 16.0 * basis.rounding());
        krylov::BlockLanczos<TensorSpace> lanczos(space, basis, block, asymmetry);
        lanczos.fill(block);
        for (int64_t i = 0; i < steps && !lanczos.complete(); ++i) lanczos.step();
        if (keep > 0) {
            std::vector<int64_t> first(static_cast<size_t>(std::min(keep, lanczos.state().m)));
            for (size_t i = 0; i < first.size(); ++i) first[i] = static_cast<int64_t>(i);
            lanczos.restart(lanczos.ritz(), first, lock);
            if (!lanczos.complete()) lanczos.step();
        }
        s = lanczos.state();
        V = lanczos.storage().load(0, s.m);
        Q = lanczos.storage().load(s.m, s.q);
    }
    const at::TensorOptions exact(at::kDouble);
    return py::make_tuple(V, to_tensor(s.T, exact), to_tensor(s.C, exact), Q, s.slack);
}

py::tuple to_tuple(const krylov::Tridiagonals& found) {
    const at::TensorOptions exact(at::kDouble);
    return py::make_tuple(to_tensor(found.alpha, exact), to_tensor(found.beta, exact), found.lengths,
                          found.applications);
}

// enough: None, or called as (alpha, beta, lengths, products) after the steps listed in `looks`; true ends
// the recurrence. Only the first so many columns of alpha and beta are filled by then.
py::tuple tridiagonalise(const py::function& product, const at::Tensor& start, int64_t steps,
                         const py::object& enough, const std::vector<int64_t>& looks) {
    check_rows("start", start);
    krylov::Tridiagonals result;
    TensorSpace space = make_space(product, start.size(1), start.options(), 0);
    {
        py::gil_scoped_release release;
        const auto look = [&](const krylov::Tridiagonals& found, int64_t done) {
            py::gil_scoped_acquire acquire;
            // Between two steps Ctrl-C ends the run.
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            if (enough.is_none() || std::find(looks.begin(), looks.end(), done) == looks.end()) return false;
            return enough(*to_tuple(found)).cast<bool>();
        };
        result = krylov::probe_lanczos(space, start.clone(), steps, look);
    }
    return to_tuple(result);
}

at::Tensor rademacher(uint64_t seed, int64_t first, int64_t K, int64_t P, const at::Tensor& like) {
    if (like.scalar_type() != at::kFloat && like.scalar_type() != at::kDouble)
        throw py::value_error("like: expected float32 or float64");
    py::gil_scoped_release release;
    return sign_rows(seed, first, K, P, like.options());
}

// X Yᵀ by each of its ways, for tests: "piece by piece", "kernel" and "batches"; "" takes the device's.
at::Tensor products_of_rows(const at::Tensor& X, const at::Tensor& Y, const std::string& way) {
    check_rows("X", X);
    check_rows("Y", Y);
    if (way == "piece by piece") return products_piece_by_piece(X, Y);
    if (way == "kernel") return products_by_kernel(X, Y);
    if (way == "batches") return products_in_batches(X, Y);
    return inner_products(X, Y);
}

}  // namespace

void bind_krylov(py::module_ module) {
    py::module_ m =
        module.def_submodule("krylov", "Block Lanczos, Gauss quadrature by Lanczos, counter-based probes.");
    py::register_exception<krylov::OperatorError>(m, "OperatorError", PyExc_ValueError);
    m.def("factorise", &factorise, py::arg("product"), py::arg("head"), py::arg("tail"), py::arg("scale"),
          py::arg("block"), py::arg("steps"), py::arg("keep"), py::arg("lock"), py::arg("seed"));
    m.def("tridiagonalise", &tridiagonalise, py::arg("product"), py::arg("start"), py::arg("steps"),
          py::arg("enough") = py::none(), py::arg("looks") = std::vector<int64_t>());
    m.def("rademacher", &rademacher, py::arg("seed"), py::arg("first"), py::arg("K"), py::arg("P"),
          py::arg("like"));
    m.def("products_of_rows", &products_of_rows, py::arg("X"), py::arg("Y"), py::arg("way") = "");
    m.def("fetches", &fetches);
}

}  // namespace flatcore
