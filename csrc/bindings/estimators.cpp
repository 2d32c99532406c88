// Python's view of the trace estimators' linear algebra: bases with their products, leave-one-out estimates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../krylov/leave_one_out.h"
#include "../krylov/range_basis.h"
#include "python_space.h"

namespace py = pybind11;

namespace flatcore {
namespace {

at::Tensor float64_vector(const EstimatorSpace& space) {
    return space.allocate(1).select(0, 0).to(at::kDouble);
}

void check_rows(const EstimatorSpace& space, const char* name, const at::Tensor& X) {
    if (X.dim() != 2 || X.size(1) != space.dimension() || X.dtype() != space.allocate(0).dtype())
        throw py::value_error(std::string(name) + ": expected rows (p, P) of the operator's dtype");
}

at::Tensor remainder_of(const EstimatorSpace& space, krylov::RangeBasis<EstimatorSpace>& basis,
                        const at::Tensor& V, const at::Tensor& Y) {
    check_rows(space, "V", V);
    check_rows(space, "Y", Y);
    at::Tensor result = Y.clone(at::MemoryFormat::Contiguous);
    basis.remainder(V, result);
    return result;
}

at::Tensor known_diagonal_of(const EstimatorSpace& space, krylov::RangeBasis<EstimatorSpace>& basis) {
    const int64_t piece = std::max(int64_t{1} << 16, space.piece(basis.rows()));
    at::Tensor result = float64_vector(space);
    for (int64_t first = 0; first < space.dimension(); first += piece) {
        const int64_t n = std::min(piece, space.dimension() - first);
        result.narrow(0, first, n).copy_(basis.known_diagonal(first, n));
    }
    return result;
}

class RangeBasis {
 public:
    RangeBasis(py::function product, const at::Tensor& like, int64_t P, uint64_t seed)
        : space_(python_space(std::move(product), like, P, seed)), basis_(space_) {}

    int64_t rows() const { return basis_.rows(); }
    at::Tensor vectors() { return basis_.Q(); }

    // b random directions, their products and those of the basis: 2 b products.
    void sketch(int64_t b) { basis_.extend(space_.apply(space_.random(b))); }

    void extend(const at::Tensor& X) {
        check_rows(space_, "X", X);
        basis_.extend(X.clone(at::MemoryFormat::Contiguous));
    }

    at::Tensor remainder(const at::Tensor& V, const at::Tensor& Y) {
        return remainder_of(space_, basis_, V, Y);
    }
    at::Tensor known_diagonal() { return known_diagonal_of(space_, basis_); }

 private:
    EstimatorSpace space_;
    krylov::RangeBasis<EstimatorSpace> basis_;
};

class LeaveOneOut {
 public:
    LeaveOneOut(py::function product, const at::Tensor& like, int64_t P, uint64_t seed,
                std::vector<std::pair<int64_t, int64_t>> slices)
        : space_(python_space(std::move(product), like, P, seed)), estimator_(space_, std::move(slices)) {}

    int64_t probes() const { return estimator_.probes(); }

    void extend(const at::Tensor& Y) {
        check_rows(space_, "Y", Y);
        estimator_.extend(Y.clone(at::MemoryFormat::Contiguous));
    }

    at::Tensor estimates(bool of_slices) {
        return to_tensor(estimator_.estimates(of_slices), at::TensorOptions(at::kDouble));
    }

    // Mean and its variance, (P,) each.
    std::pair<at::Tensor, at::Tensor> diagonal() {
        at::Tensor mean = float64_vector(space_), squares = float64_vector(space_);
        const double factor = estimator_.diagonal_moments(mean, squares);
        const auto m = static_cast<double>(probes());
        return {mean, squares.mul_(factor / (m * (m - 1.0)))};
    }

    at::Tensor remainder(const at::Tensor& V, const at::Tensor& Y) {
        return remainder_of(space_, estimator_.basis(), V, Y);
    }
    at::Tensor known_diagonal() { return known_diagonal_of(space_, estimator_.basis()); }

 private:
    EstimatorSpace space_;
    krylov::LeaveOneOut<EstimatorSpace> estimator_;
};

using Unlocked = py::call_guard<py::gil_scoped_release>;

}  // namespace

void bind_estimators(py::module_ module) {
    py::module_ m = module.def_submodule("estimators", "Projections and leave-one-out trace estimates.");
    py::class_<RangeBasis>(m, "RangeBasis")
        .def(py::init<py::function, const at::Tensor&, int64_t, uint64_t>(), py::arg("product"),
             py::arg("like"), py::arg("P"), py::arg("seed"))
        .def_property_readonly("rows", &RangeBasis::rows)
        .def_property_readonly("vectors", &RangeBasis::vectors)
        .def("sketch", &RangeBasis::sketch, py::arg("b"), Unlocked())
        .def("extend", &RangeBasis::extend, py::arg("X"), Unlocked())
        .def("remainder", &RangeBasis::remainder, py::arg("V"), py::arg("Y"), Unlocked())
        .def("known_diagonal", &RangeBasis::known_diagonal, Unlocked());
    py::class_<LeaveOneOut>(m, "LeaveOneOut")
        .def(py::init<py::function, const at::Tensor&, int64_t, uint64_t,
                      std::vector<std::pair<int64_t, int64_t>>>(),
             py::arg("product"), py::arg("like"), py::arg("P"), py::arg("seed"), py::arg("slices"))
        .def_property_readonly("probes", &LeaveOneOut::probes)
        .def("extend", &LeaveOneOut::extend, py::arg("Y"), Unlocked())
        .def("estimates", &LeaveOneOut::estimates, py::arg("of_slices"), Unlocked())
        .def("diagonal", &LeaveOneOut::diagonal, Unlocked())
        .def("remainder", &LeaveOneOut::remainder, py::arg("V"), py::arg("Y"), Unlocked())
        .def("known_diagonal", &LeaveOneOut::known_diagonal, Unlocked());
}

}  // namespace flatcore
