// Python's view of the engine: a verified program, a state per batch, products.
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>
#include <set>
#include <thread>

#include "engine/contiguous_rows.h"
#include "engine/float32_products.h"
#include "engine/gemm_bf16.h"
#include "engine/gemm_choice.h"
#include "engine/on_device.h"
#include "engine/quadratic_form.h"
#include "engine/rule.h"
#include "engine/rules/attention_policy.h"
#include "engine/sweep.h"
#include "engine/workspace.h"
#include "external.h"
#include "kernels/parallel.h"
#include "linearization.h"

namespace py = pybind11;

namespace flatcore {
namespace {

ValueKind kind_named(const std::string& name) {
    if (name == "parameter") return ValueKind::parameter;
    if (name == "constant") return ValueKind::constant;
    if (name == "activation") return ValueKind::activation;
    throw py::value_error("value kind: expected parameter, constant or activation, got '" + name + "'");
}

Precision precision_named(const std::string& name) {
    if (name == "full") return Precision::full;
    if (name == "tf32") return Precision::tf32;
    if (name == "bf16") return Precision::bf16;
    throw py::value_error("precision: expected full, tf32 or bf16, got '" + name + "'");
}

// bool before int: a Python bool is an int too.
Attribute attribute_from(const py::handle& value) {
    if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
    if (py::isinstance<py::int_>(value)) return value.cast<int64_t>();
    if (py::isinstance<py::float_>(value)) return value.cast<double>();
    if (py::isinstance<py::str>(value)) return value.cast<std::string>();
    if (py::hasattr(value, "adjoint")) return python_function(py::reinterpret_borrow<py::object>(value));
    return value.cast<Integers>();
}

using PyValue = std::tuple<std::string, Integers>;
using PyOp = std::tuple<std::string, std::vector<int>, int, py::dict, std::string>;

std::shared_ptr<Program> make_program(const std::vector<PyValue>& py_values, const std::vector<PyOp>& py_ops,
                                      const std::unordered_map<int, int64_t>& offsets, int64_t parameters,
                                      int loss, std::vector<int> cut, const std::string& device,
                                      int64_t room) {
    std::vector<Value> values;
    for (const auto& [kind, shape] : py_values) values.push_back({kind_named(kind), shape, 0});
    for (const auto& [id, offset] : offsets) values.at(static_cast<size_t>(id)).offset = offset;
    std::vector<Op> ops;
    for (const auto& [kind, inputs, output, attributes, path] : py_ops) {
        std::map<std::string, Attribute> entries;
        for (const auto& [name, value] : attributes)
            entries[name.cast<std::string>()] = attribute_from(value);
        ops.push_back({kind, inputs, output, Attributes(std::move(entries)), path});
    }
    return std::make_shared<Program>(std::move(values), std::move(ops), parameters, loss, std::move(cut),
                                     on_gpu(at::Device(device)), room);
}

void check_leaves(const Program& program, const std::unordered_map<int, at::Tensor>& leaves) {
    for (size_t id = 0; id < program.values().size(); ++id) {
        const Value& value = program.values()[id];
        if (value.kind == ValueKind::activation) continue;
        const auto leaf = leaves.find(static_cast<int>(id));
        TORCH_CHECK_VALUE(leaf != leaves.end(), "leaves: value ", id, " of the program has no tensor");
        TORCH_CHECK_VALUE(leaf->second.sizes().equals(value.shape), "leaves: value ", id, " expected shape ",
                          at::IntArrayRef(value.shape), ", got ", leaf->second.sizes());
    }
}

void check_directions(const State& state, const at::Tensor& t, const char* name) {
    const int64_t P = state.program().parameters();
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == P && (P <= 1 || t.stride(1) == 1), name, ": expected (K, ",
                      P, ") with unit stride along the parameters, got shape ", t.sizes(), " and strides ",
                      t.strides());
    TORCH_CHECK_TYPE(t.scalar_type() == state.options().dtype() && t.device() == state.options().device(),
                     name, ": expected ", state.options().dtype(), " on ", state.options().device(), ", got ",
                     t.scalar_type(), " on ", t.device());
}

std::unique_ptr<Linearization> make_linearization(std::shared_ptr<Program> program,
                                                  const std::unordered_map<int, at::Tensor>& leaves,
                                                  double seed) {
    check_leaves(*program, leaves);
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto state = std::make_unique<State>(*program, leaves, seed);
    return std::make_unique<Linearization>(Linearization{std::move(program), std::move(state), seed});
}

Mode checked_mode(const Linearization& self, const std::string& mode) {
    const Mode parsed = mode_named(mode);
    TORCH_CHECK_VALUE(parsed == Mode::hessian || !self.program->cut().empty(), "mode: ", mode,
                      " needs a program with a cut, got one without");
    return parsed;
}

Precision checked_precision(const at::Tensor& V, const std::string& precision) {
    const Precision rounding = precision_named(precision);
    if (rounding == Precision::full) return rounding;
    const bool there = on_gpu(V) || (rounding == Precision::bf16 && bf16_available());
    TORCH_CHECK_VALUE(V.scalar_type() == at::kFloat && there, "precision: ", precision,
                      " needs float32 on a device with instructions for it, got ", V.scalar_type(), " on ",
                      V.device());
    return rounding;
}

void run_product(const Linearization& self, const at::Tensor& V, const at::Tensor& Y, const std::string& mode,
                 bool accumulate, int64_t batch_examples, double examples, const std::string& precision) {
    check_directions(*self.state, V, "V");
    check_directions(*self.state, Y, "Y");
    TORCH_CHECK_VALUE(V.size(0) == Y.size(0), "Y: expected ", V.size(0), " directions like V, got ",
                      Y.size(0));
    const Mode parsed = checked_mode(self, mode);
    const Precision rounding = checked_precision(V, precision);
    if (V.size(0) == 0) return;
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    product(*self.state, parsed, V, Y, accumulate, batch_examples, examples, rounding);
}

void run_quadratic_form(const Linearization& self, const at::Tensor& V, const at::Tensor& q,
                        const std::string& mode, int64_t batch_examples, double examples,
                        const std::string& precision) {
    check_directions(*self.state, V, "V");
    TORCH_CHECK_VALUE(q.dim() == 1 && q.size(0) == V.size(0) && q.scalar_type() == at::kDouble && q.is_cpu(),
                      "q: expected one double per direction");
    const Mode parsed = checked_mode(self, mode);
    const Precision rounding = checked_precision(V, precision);
    if (V.size(0) == 0) return;
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    quadratic_form(*self.state, parsed, V, q, batch_examples, examples, rounding);
}

void run_gradient(const Linearization& self, const at::Tensor& y, bool accumulate) {
    check_directions(*self.state, y.unsqueeze(0), "y");
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView guard;
    gradient(*self.state, y, accumulate, self.seed);
}

// Float32Products for a `with` statement.
class Float32Scope {
 public:
    Float32Scope(const std::string& device, const std::string& precision)
        : device_(device), precision_(precision_named(precision)) {}
    void enter() {
        py::gil_scoped_release release;  // another thread may hold the settings
        products_ = std::make_unique<Float32Products>(device_, precision_);
    }
    void exit() { products_.reset(); }

 private:
    at::Device device_;
    Precision precision_;
    std::unique_ptr<Float32Products> products_;
};

}  // namespace

Mode mode_named(const std::string& name) {
    if (name == "hessian") return Mode::hessian;
    if (name == "ggn") return Mode::ggn;
    if (name == "covariance") return Mode::covariance;
    if (name == "remainder") return Mode::remainder;
    throw py::value_error("mode: expected hessian, ggn, covariance or remainder, got '" + name + "'");
}

void bind_engine(py::module_ m) {
    auto engine = m.def_submodule("engine", "The second-order program and its sweeps.");
    engine.def(
        "threads_used",
        [] {
            std::set<std::thread::id> ids;
            std::mutex mutex;
            parallel_for(0, 1 << 16, 1, [&](int64_t, int64_t) {
                const std::lock_guard lock(mutex);
                ids.insert(std::this_thread::get_id());
            });
            return ids.size();
        },
        "Number of threads that a large kernel loop really runs on.");
    engine.def("workspace_bytes", &workspace_bytes,
               "Bytes kept between products for the tensors of the next one, in all programs.");
    engine.def(
        "fresh_rows",
        [](int64_t K, int64_t P, const at::Tensor& like, int64_t most) {
            return fresh_rows(K, P, like.options(), most);
        },
        py::arg("K"), py::arg("P"), py::arg("like"), py::arg("most"),
        "A matrix (K, P), not written yet, of the kind of `like`, whose memory may be kept for the next "
        "one.");
    engine.def("spare_bytes", &spare_bytes, "Bytes kept for the next matrix of products.");
    engine.def("contiguous_rows", &contiguous_rows, py::arg("rows"), py::arg("most"),
               py::call_guard<py::gil_scoped_release>(),
               "A copy of a matrix of any strides with each row in one piece, in `fresh_rows`.");
    engine.attr("gpu") = kGpu;
    py::class_<Float32Scope>(engine, "Float32Products", "How float32 is multiplied on a device meanwhile.")
        .def(py::init<const std::string&, const std::string&>(), py::arg("device"),
             py::arg("precision") = "full")
        .def("__enter__", &Float32Scope::enter)
        .def("__exit__", [](Float32Scope& self, const py::args&) { self.exit(); });
    engine.def("op_kinds", &rule_kinds, "Names of the op kinds with native rules.");
    engine.def("set_gemm_policy", &set_gemm_policy, py::arg("policy"),
               "Which library multiplies float32 matrices: measure, blas or onednn.");
    engine.def("set_attention_policy", &set_attention_policy, py::arg("policy"),
               "Attention on a GPU, for states made from now on: choose, tiles or fused.");
    engine.def("onednn_multiplies", &onednn_multiplies,
               "Does torch's oneDNN take float32 matrices on this processor?");
    engine.def("gemm_choices", &gemm_choices, "What was measured: class of shapes -> oneDNN is faster.");
    engine.def("set_gemm_choices", &set_gemm_choices, py::arg("choices"));
    engine.def(
        "multiply",
        [](const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
            py::gil_scoped_release release;
            at::AutoDispatchBelowADInplaceOrView guard;
            multiply(c, a, b, accumulate);
        },
        py::arg("c"), py::arg("a"), py::arg("b"), py::arg("accumulate"),
        "c = a b or c += a b by the library chosen.");
    engine.def("bf16_available", &bf16_available,
               "Does this processor multiply bfloat16 itself, and torch's kernel give the right numbers?");
    engine.def(
        "multiply_bf16",
        [](const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
            TORCH_CHECK_VALUE(bf16_available(), "multiply_bf16: this processor does not multiply bfloat16");
            TORCH_CHECK_VALUE(c.size(-1) && c.size(-2) && a.size(-1),
                              "multiply_bf16: expected matrices with elements");
            py::gil_scoped_release release;
            multiply_bf16(c, a, b, accumulate);
        },
        py::arg("c"), py::arg("a"), py::arg("b"), py::arg("accumulate"),
        "c = a b or c += a b of float32 matrices, operands rounded to bfloat16, sums in float32.");
    py::class_<Program, std::shared_ptr<Program>>(engine, "Program")
        .def(py::init(&make_program), py::arg("values"), py::arg("ops"), py::arg("offsets"),
             py::arg("parameters"), py::arg("loss"), py::arg("cut"), py::arg("device") = "cpu",
             py::arg("room") = 0)
        .def(
            "flops",
            [](const Program& p, const std::string& mode, int64_t K) { return p.flops(mode_named(mode), K); },
            py::arg("mode"), py::arg("K"))
        .def(
            "peak_bytes",
            [](const Program& p, const std::string& mode, int64_t K, int64_t itemsize,
               const std::string& precision) {
                return p.peak_bytes(mode_named(mode), K, itemsize, precision_named(precision));
            },
            py::arg("mode"), py::arg("K"), py::arg("itemsize"), py::arg("precision") = "full")
        .def(
            "rounded_flops",
            [](const Program& p, const std::string& mode, int64_t K) {
                return p.rounded_flops(mode_named(mode), K);
            },
            py::arg("mode"), py::arg("K"))
        .def("has_remainder", &Program::has_remainder)
        .def("state_bytes", &Program::state_bytes, py::arg("itemsize"))
        .def(
            "op_flops",
            [](const Program& p, size_t op, const std::string& mode, int64_t K) {
                return p.rule(op).flops(K, p.second_order(mode_named(mode), op));
            },
            py::arg("op"), py::arg("mode"), py::arg("K"));
    py::class_<Linearization> linearization(engine, "Linearization");
    linearization.def(py::init(&make_linearization), py::arg("program"), py::arg("leaves"), py::arg("seed"))
        .def_property_readonly("loss", [](const Linearization& self) { return self.state->loss(); })
        .def_property_readonly("bytes", [](const Linearization& self) { return self.state->bytes(); })
        .def(
            "value", [](const Linearization& self, int id) { return self.state->value(id); }, py::arg("id"))
        .def(
            "adjoint", [](const Linearization& self, int id) { return self.state->adjoint(id); },
            py::arg("id"))
        .def(
            "saved",
            [](const Linearization& self, size_t op) {
                TORCH_CHECK_INDEX(op < self.program->ops().size(), "op: expected the number of an op");
                return self.state->saved(self.program->ops()[op]);
            },
            py::arg("op"))
        .def("product", &run_product, py::arg("V"), py::arg("Y"), py::arg("mode"), py::arg("accumulate"),
             py::arg("batch_examples"), py::arg("examples"), py::arg("precision") = "full")
        .def("quadratic_form", &run_quadratic_form, py::arg("V"), py::arg("q"), py::arg("mode"),
             py::arg("batch_examples"), py::arg("examples"), py::arg("precision") = "full")
        .def("gradient", &run_gradient, py::arg("y"), py::arg("accumulate"));
    bind_example_probes(engine, linearization);
}

}  // namespace flatcore
