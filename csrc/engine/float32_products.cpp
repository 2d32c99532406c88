#include "float32_products.h"

namespace flatcore {

namespace {

constexpr auto kBackend = at::Float32Backend::CUDA;
constexpr auto kConvolution = at::Float32Op::CONV;

std::recursive_mutex one_at_a_time;

at::Float32Precision rounding(bool rounds) {
    return rounds ? at::Float32Precision::TF32 : at::Float32Precision::IEEE;
}

}  // namespace

Float32Products::Float32Products(const at::Device& device, Precision precision)
    : rounds_(precision != Precision::full) {
    if (!device.is_cuda()) return;
    lock_ = std::unique_lock(one_at_a_time);
    at::Context& context = at::globalContext();
    // Matrices: a guard of this thread forbids TF32, only the process can allow it.
    if (!rounds_) {
        exact_.emplace();
    } else if (context.float32Precision(kBackend, at::Float32Op::MATMUL) != rounding(true)) {
        context.setAllowTF32CuBLAS(true);
        matrices_set_ = true;
    }
    if (context.allowTF32CuDNN(kConvolution) != rounds_) {
        context.setFloat32Precision(kBackend, kConvolution, rounding(rounds_));
        convolutions_set_ = true;
    }
}

Float32Products::~Float32Products() {
    at::Context& context = at::globalContext();
    if (matrices_set_) context.setAllowTF32CuBLAS(false);
    if (convolutions_set_) context.setFloat32Precision(kBackend, kConvolution, rounding(!rounds_));
}

}  // namespace flatcore
