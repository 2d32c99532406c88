#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace flatcore {

void bind_engine(py::module_ m);
void bind_krylov(py::module_ m);
void bind_estimators(py::module_ m);
void bind_solvers(py::module_ m);
void bind_eigensolver(py::module_ m);
void bind_changes(py::module_ m);

}  // namespace flatcore

PYBIND11_MODULE(_C, m) {
    flatcore::bind_engine(m);
    flatcore::bind_krylov(m);
    flatcore::bind_estimators(m);
    flatcore::bind_solvers(m);
    flatcore::bind_eigensolver(m);
    flatcore::bind_changes(m);
}
