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

// The value by which a setting follows the more general one; versions of torch before 2.13 have one for all.
template <class P>
constexpr P inherited() {
    if constexpr (requires { P::DEFAULT; })
        return P::DEFAULT;
    else
        return P::NONE;
}

// Puts back what was inherited as inherited, where that comes to the same.
void restore(Float32Op op, Float32Precision before) {
    at::Context& context = at::globalContext();
    context.setFloat32Precision(kBackend, op, inherited<Float32Precision>());
    if (context.float32Precision(kBackend, op) != before) context.setFloat32Precision(kBackend, op, before);
}

// "medium" also rounds matrices, and has a name of its own. Asking throws where old and new settings differ.
bool matrices_are_medium() {
    try {
        return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
    } catch (const c10::Error&) {
        return false;
    }
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
        medium_ = matrices_are_medium();
        context.setAllowTF32CuBLAS(rounds_);
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
        context.setAllowTF32CuBLAS(!rounds_);
        if (medium_) context.setFloat32MatmulPrecision("medium");
    }
    if (set_convolutions_) {
        context.setAllowTF32CuDNN(convolutions_ == Float32Precision::TF32);
        restore(Float32Op::CONV, convolutions_);
        restore(Float32Op::RNN, recurrent_);
    }
}

}  // namespace flatcore
