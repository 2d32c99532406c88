// Python's view of the eigensolver: an object that is stepped, looked at, written down and taken up again.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/stl.h>

#include "../krylov/eigensolver.h"
#include <optional>

#include "products.h"

namespace py = pybind11;

namespace flatcore {
namespace {

krylov::Which which_named(const std::string& name) {
    if (name == "LM") return krylov::Which::LM;
    if (name == "LA") return krylov::Which::LA;
    if (name == "SA") return krylov::Which::SA;
    if (name == "BE") return krylov::Which::BE;
    throw py::value_error("which: expected LM, LA, SA or BE, got '" + name + "'");
}

const char* status_name(krylov::EigenStatus status) {
    switch (status) {
    case krylov::EigenStatus::running:
        return "running";
    case krylov::EigenStatus::converged:
        return "converged";
    case krylov::EigenStatus::out_of_products:
        return "out_of_products";
    case krylov::EigenStatus::copies_not_checked:
        return "copies_not_checked";
    case krylov::EigenStatus::stagnated:
        return "stagnated";
    }
    return "unknown";
}

class Solver {
 public:
    Solver(py::function product, const at::Tensor& head, const at::Tensor& tail, double scale, int64_t k,
           const std::string& which, double tol, int64_t block, int64_t max_products, double asymmetry,
           bool verify, uint64_t seed, const std::optional<at::Tensor>& file)
        : mapped_(file ? MappedRows(*file, tail.size(0)) : MappedRows()),
          space_(make_space(std::move(product), head.size(1), head.options(), seed, mapped_)),
          solver_(space_, TensorBasis(head, tail, scale, mapped_),
                  {k, which_named(which), tol, block, max_products, asymmetry, verify}) {}

    void start(const at::Tensor& rows) {
        check_rows("start", rows);
        telling_where([&] { solver_.start(rows); });
    }

    bool step() {
        bool more = false;
        telling_where([&] { more = solver_.step(); });
        return more;
    }

    py::dict look() {
        const krylov::Factorisation& s = solver_.lanczos().state();
        py::dict out;
        out["products"] = s.applications;
        out["steps"] = s.steps;
        out["rows"] = s.m + s.q;
        out["residuals"] = solver_.residuals();
        out["scale"] = solver_.search().scale;
        return out;
    }

    py::dict result() {
        krylov::EigenResult<at::Tensor> found;
        {
            py::gil_scoped_release release;
            found = solver_.result();
            if (!found.values.empty()) found.vectors = own(found.vectors);
        }
        py::dict out = look();
        out["values"] = found.values;
        if (!found.values.empty()) out["vectors"] = found.vectors;
        out["residuals"] = found.residuals;
        out["restarts"] = solver_.search().restarts;
        out["status"] = status_name(found.status);
        return out;
    }

    // All but the basis, of which the first `rows` rows of head and tail count.
    py::dict state() {
        const krylov::Factorisation& s = solver_.lanczos().state();
        const krylov::Search& search = solver_.search();
        py::list injections;
        for (const krylov::Injection& injection : s.injections)
            injections.append(py::make_tuple(injection.step, injection.rows));
        py::dict out;
        out["sizes"] = py::make_tuple(s.m, s.q, s.locked, s.width, s.steps, s.applications);
        out["T"] = s.T.data;
        out["C"] = s.C.data;
        out["slack"] = s.slack;
        out["scale"] = s.scale;
        out["injections"] = injections;
        out["search"] =
            py::make_tuple(search.warm, search.scale, search.restarts, search.worst, search.verified,
                           search.copies_not_checked, search.tight, search.looked, search.settled);
        out["random_rows"] = space_.random_rows();
        return out;
    }

    void restore(const py::dict& in) {
        krylov::Factorisation s;
        krylov::Search search;
        const auto sizes = in["sizes"].cast<std::vector<int64_t>>();
        if (sizes.size() != 6) throw py::value_error("state: expected six sizes");
        s.m = sizes[0], s.q = sizes[1], s.locked = sizes[2], s.width = sizes[3], s.steps = sizes[4];
        s.applications = sizes[5];
        s.T = krylov::Matrix(s.m, s.m);
        s.T.data = in["T"].cast<std::vector<double>>();
        s.C = krylov::Matrix(s.m, s.q);
        s.C.data = in["C"].cast<std::vector<double>>();
        s.slack = in["slack"].cast<std::vector<double>>();
        s.scale = in["scale"].cast<double>();
        for (const auto& [step, rows] : in["injections"].cast<std::vector<std::pair<int64_t, int64_t>>>())
            s.injections.push_back({step, rows});
        std::tie(search.warm, search.scale, search.restarts, search.worst, search.verified,
                 search.copies_not_checked, search.tight, search.looked, search.settled) =
            in["search"]
                .cast<std::tuple<bool, double, int64_t, double, int64_t, bool, bool, bool, int64_t>>();
        space_.set_random_rows(in["random_rows"].cast<int64_t>());
        solver_.restore(std::move(s), search);
    }

    // |v A - (T V + C Q)| for the first row v of the basis, relative to the scale, and what was left out of
    // it: that a basis taken up again belongs to this operator. One product.
    std::pair<double, double> defect() {
        py::gil_scoped_release release;
        auto& lanczos = solver_.lanczos();
        const krylov::Factorisation& s = lanczos.state();
        at::Tensor left = space_.apply(lanczos.storage().load(0, 1).contiguous());
        lanczos.count(1);
        krylov::Matrix row(1, s.m + s.q);
        for (int64_t j = 0; j < s.m; ++j) row(0, j) = s.T(0, j);
        for (int64_t j = 0; j < s.q; ++j) row(0, s.m + j) = s.C(0, j);
        lanczos.storage().update(left, row, s.m + s.q);
        const double scale = s.scale > 0.0 ? s.scale : 1.0;
        return {space_.lengths(left)[0] / scale, s.slack[0] / scale};
    }

 private:
    // Not in the file, which is overwritten by what comes next and lives as long as any of its rows.
    at::Tensor own(const at::Tensor& X) const {
        if (!mapped_.holds(X)) return X;
        at::Tensor copy = at::empty_like(X);
        for (int64_t i = 0; i < X.size(0); ++i) {
            copy.select(0, i).copy_(X.select(0, i));
            mapped_.rest(X.narrow(0, i, 1));
        }
        return copy;
    }

    template <class Action>
    void telling_where(Action action) {
        py::gil_scoped_release release;
        const krylov::Factorisation& s = solver_.lanczos().state();
        const int64_t step = s.steps + 1, products = s.applications;
        try {
            action();
        } catch (const krylov::OperatorError& error) {
            throw krylov::OperatorError(std::string(error.what()) + " It came up in step " +
                                        std::to_string(step) + ", after " + std::to_string(products) +
                                        " products.");
        }
    }

    MappedRows mapped_;
    TensorSpace space_;
    krylov::EigenSolver<TensorSpace> solver_;
};

}  // namespace

void bind_eigensolver(py::module_ module) {
    py::module_ m = module.attr("krylov");
    py::class_<Solver>(m, "EigenSolver")
        // file: mapped, with the rows of `tail` first and room for blocks behind them
        .def(py::init<py::function, at::Tensor, at::Tensor, double, int64_t, std::string, double, int64_t,
                      int64_t, double, bool, uint64_t, std::optional<at::Tensor>>(),
             py::kw_only(), py::arg("product"), py::arg("head"), py::arg("tail"), py::arg("scale"),
             py::arg("k"), py::arg("which"), py::arg("tol"), py::arg("block"), py::arg("max_products"),
             py::arg("asymmetry"), py::arg("verify"), py::arg("seed"), py::arg("file") = py::none())
        .def("start", &Solver::start, py::arg("rows"))
        .def("step", &Solver::step)
        .def("look", &Solver::look)
        .def("result", &Solver::result)
        .def("state", &Solver::state)
        .def("restore", &Solver::restore, py::arg("state"))
        .def("defect", &Solver::defect);
}

}  // namespace flatcore
