// Probes of each example's own, and sweeps from the outputs.
#include "engine/example_probes.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "engine/on_device.h"
#include "linearization.h"

namespace py = pybind11;

namespace flatcore {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_double(const at::Tensor& t, at::IntArrayRef shape, const char* name) {
    TORCH_CHECK_VALUE(t.scalar_type() == at::kDouble && t.is_contiguous() && t.sizes() == shape, name,
                      ": expected contiguous doubles of shape ", shape, ", got ", t.scalar_type(),
                      " of shape ", t.sizes());
}

// sums (K, probed parameters, examples)
ExampleProbes probes_for(const at::Tensor& sums, uint64_t seed, int64_t first_probe, int64_t first_example,
                         const OptionalTensor& diagonal, const OptionalTensor& variance) {
    TORCH_CHECK_VALUE(sums.dim() == 3, "sums: expected 3 axes, got ", sums.dim());
    check_double(sums, sums.sizes(), "sums");
    ExampleProbes probes;
    probes.block = {seed, first_probe, sums.size(0), first_example, sums.size(2)};
    probes.sums = sums;
    if (diagonal) probes.diagonal = *diagonal;
    if (variance) probes.variance = *variance;
    if (diagonal) check_double(*diagonal, {diagonal->size(0)}, "diagonal");
    if (variance) {
        check_double(*variance, {variance->size(0)}, "variance");
        TORCH_CHECK_VALUE(diagonal && sums.size(0) >= 2, "variance: expected a diagonal and two probes");
    }
    return probes;
}

void run_example_pass(const Linearization& self, const std::string& mode, const at::Tensor& sums,
                      uint64_t seed, int64_t first_probe, int64_t first_example, bool relative,
                      const OptionalTensor& diagonal, const OptionalTensor& variance) {
    const Mode parsed = mode_named(mode);
    TORCH_CHECK_VALUE(self.program->parameters() == 0, "program: expected probes for all of its parameters");
    TORCH_CHECK_VALUE(parsed != Mode::covariance, "mode: expected hessian, ggn or remainder, got covariance");
    TORCH_CHECK_VALUE(parsed == Mode::hessian || !self.program->cut().empty(), "mode: ", mode,
                      " needs a program with a cut, got one without");
    TORCH_CHECK_VALUE(!relative || !diagonal, "relative: such probes have no diagonal");
    ExampleProbes probes = probes_for(sums, seed, first_probe, first_example, diagonal, variance);
    probes.relative = relative;
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    example_pass(*self.state, parsed, probes);
}

// (K, examples, count) signs of elements that no parameter has.
at::Tensor output_signs(const at::Tensor& like, uint64_t seed, int64_t first_probe, int64_t K,
                        int64_t first_example, int64_t examples, int64_t count) {
    at::Tensor signs = at::empty({K, examples, count}, like.options());
    AT_DISPATCH_FLOATING_TYPES(signs.scalar_type(), "signs", [&] {
        const ExampleBlock block{seed, first_probe, K, first_example, examples};
        FLATCORE_RUN(signs, example_signs<scalar_t>, block, int64_t{1} << 60, count,
                     signs.mutable_data_ptr<scalar_t>());
    });
    return signs;
}

at::Tensor run_cut_curvature(const Linearization& self, const at::Tensor& directions) {
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    return cut_curvature(*self.state, directions);
}

void run_output_pass(const Linearization& self, int value, const at::Tensor& cotangents,
                     const at::Tensor& sums, const OptionalTensor& diagonal) {
    ExampleProbes probes = probes_for(sums, 0, 0, 0, diagonal, {});
    probes.squares = true;
    const auto& values = self.program->values();
    TORCH_CHECK_VALUE(value >= 0 && value < static_cast<int>(values.size()) &&
                          values[static_cast<size_t>(value)].kind == ValueKind::activation,
                      "value: expected the id of an activation, got ", value);
    TORCH_CHECK_VALUE(cotangents.dim() > 0 &&
                          cotangents.sizes().slice(1).equals(values[static_cast<size_t>(value)].shape),
                      "cotangents: expected (K, ", at::IntArrayRef(values[static_cast<size_t>(value)].shape),
                      "), got ", cotangents.sizes());
    TORCH_CHECK_VALUE(cotangents.size(0) == sums.size(0), "cotangents: expected ", sums.size(0),
                      " directions like sums, got ", cotangents.size(0));
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    output_pass(*self.state, probes, value, cotangents);
}

}  // namespace

void bind_example_probes(py::module_ engine, py::class_<Linearization>& linearization) {
    engine.def("output_signs", &output_signs, py::arg("like"), py::arg("seed"), py::arg("first_probe"),
               py::arg("K"), py::arg("first_example"), py::arg("examples"), py::arg("count"),
               "Random signs (K, examples, count) of each example's own, for its outputs.");
    linearization
        .def("example_pass", &run_example_pass, py::arg("mode"), py::arg("sums"), py::arg("seed"),
             py::arg("first_probe"), py::arg("first_example"), py::arg("relative") = false,
             py::arg("diagonal") = py::none(), py::arg("variance") = py::none())
        .def("cut_curvature", &run_cut_curvature, py::arg("directions"))
        .def("output_pass", &run_output_pass, py::arg("value"), py::arg("cotangents"), py::arg("sums"),
             py::arg("diagonal") = py::none());
}

}  // namespace flatcore
