#include "float32_products.h"

namespace flatcore {

namespace {

using at::Float32Op;
using at::Float32Precision;

constexpr auto kBackend = at::Float32Backend::CUDA;

std::recursive_mutex one_at_a_time;

Float32Precision set_to(Float32Op op) { return at::globalContext().float32Precision(kBackend, op); }

bool rounds(Float32Op op) { return set_to(op) == Float32Precision::TF32; }

Float32Precision rounding(bool rounds) { return rounds ? Float32Precision::TF32 : Float32Precision::IEEE; }

// The name of the old setting of matrix products; empty where old and new ones differ, and asking throws.
std::string name_of_matrices() {
    try {
        switch (at::globalContext().float32MatmulPrecision()) {
        case at::Float32MatmulPrecision::HIGHEST:
            return "highest";
        case at::Float32MatmulPrecision::HIGH:
            return "high";
        case at::Float32MatmulPrecision::MEDIUM:
            return "medium";
        }
    } catch (const c10::Error&) {
    }
    return "";
}

}  // namespace

// Old and new settings are always changed together: where they differ, torch's own getters throw.
Float32Products::Float32Products(const at::Device& device, Precision precision)
    : rounds_(precision != Precision::full) {
    if (!device.is_cuda()) return;
    lock_ = std::unique_lock(one_at_a_time);
    at::Context& context = at::globalContext();
    set_matrices_ = rounds(Float32Op::MATMUL) != rounds_;
    if (set_matrices_) {
        name_ = name_of_matrices();
        matrices_ = set_to(Float32Op::MATMUL);
        if (name_.empty())
            context.setFloat32Precision(kBackend, Float32Op::MATMUL, rounding(rounds_));
        else
            context.setFloat32MatmulPrecision(rounds_ ? "high" : "highest");
    }
    set_convolutions_ = rounds(Float32Op::CONV) != rounds_;
    if (set_convolutions_) {
        convolutions_ = set_to(Float32Op::CONV);
        recurrent_ = set_to(Float32Op::RNN);
        context.setAllowTF32CuDNN(rounds_);
        for (const Float32Op op : {Float32Op::CONV, Float32Op::RNN})
            context.setFloat32Precision(kBackend, op, rounding(rounds_));
    }
}

Float32Products::~Float32Products() {
    at::Context& context = at::globalContext();
    if (set_matrices_) {
        if (name_.empty())
            context.setFloat32Precision(kBackend, Float32Op::MATMUL, matrices_);
        else
            context.setFloat32MatmulPrecision(name_);
    }
    if (set_convolutions_) {
        context.setAllowTF32CuDNN(convolutions_ == Float32Precision::TF32);
        context.setFloat32Precision(kBackend, Float32Op::CONV, convolutions_);
        context.setFloat32Precision(kBackend, Float32Op::RNN, recurrent_);
    }
}

}  // namespace flatcore
