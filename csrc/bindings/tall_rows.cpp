#include "tall_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../engine/float32_products.h"
#include "../engine/on_device.h"
#include "../kernels/tall.h"

namespace flatcore {
namespace {

constexpr int64_t kPiece = int64_t{1} << 14;  // columns
// Up to so many rows the kernels read Y once or twice, at the pace of the memory, while a matrix product of a
// library fills up a tile of 32 or more. Beyond that the arithmetic decides, and the library is better at it.
// By reasoning: not measured on a GPU.
constexpr int64_t kFewRows = 8;
constexpr int64_t kMostFactors = 128;

bool suits_kernel(const at::Tensor& X, const at::Tensor& Y) {
    return on_gpu(X) && X.size(0) <= kFewRows && X.stride(1) == 1 && Y.stride(1) == 1;
}

}  // namespace

at::Tensor products_piece_by_piece(const at::Tensor& X, const at::Tensor& Y) {
    const int64_t P = X.size(1);
    at::Tensor sum = at::zeros({X.size(0), Y.size(0)}, X.options().dtype(at::kDouble));
    for (int64_t first = 0; first < P; first += kPiece) {
        const int64_t n = std::min(kPiece, P - first);
        sum.add_(at::mm(X.narrow(1, first, n), Y.narrow(1, first, n).t()));
    }
    return sum;
}

at::Tensor products_by_kernel(const at::Tensor& X, const at::Tensor& Y) {
    const int64_t p = X.size(0), m = Y.size(0), P = X.size(1);
    const at::TensorOptions numbers = X.options().dtype(at::kDouble);
    const at::Tensor result = at::empty({p, m}, numbers);
    const at::Tensor workspace = at::empty({tall_gram_workspace(p, m, P)}, numbers);
    AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "inner_products", [&] {
        FLATCORE_RUN(X, tall_gram<scalar_t>, p, m, P, X.const_data_ptr<scalar_t>(), X.stride(0),
                     Y.const_data_ptr<scalar_t>(), Y.stride(0), workspace.mutable_data_ptr<double>(),
                     result.mutable_data_ptr<double>());
    });
    return result;
}

at::Tensor products_in_batches(const at::Tensor& X, const at::Tensor& Y) {
    const Float32Products full_precision(X.device(), Precision::full);
    const int64_t P = X.size(1), whole = P / kPiece * kPiece;
    const auto pieces = [whole](const at::Tensor& A) {
        return A.narrow(1, 0, whole).unflatten(1, {whole / kPiece, kPiece}).transpose(0, 1);
    };
    at::Tensor sum = at::bmm(pieces(X), pieces(Y).transpose(1, 2)).sum(0, false, at::kDouble);
    if (whole < P) sum.add_(at::mm(X.narrow(1, whole, P - whole), Y.narrow(1, whole, P - whole).t()));
    return sum;
}

at::Tensor inner_products(const at::Tensor& X, const at::Tensor& Y) {
    // The BLAS is twice as fast with the narrow factor on the left.
    if (X.size(0) > Y.size(0)) return inner_products(Y, X).t();
    if (!on_gpu(X)) return products_piece_by_piece(X, Y);
    return suits_kernel(X, Y) ? products_by_kernel(X, Y) : products_in_batches(X, Y);
}

void update_rows(const at::Tensor& X, const at::Tensor& B, const at::Tensor& Y) {
    if (!suits_kernel(X, Y) || Y.size(0) > kMostFactors) {
        const Float32Products full_precision(X.device(), Precision::full);
        at::Tensor(X).addmm_(B, Y, 1, -1);
        return;
    }
    const at::Tensor factors = B.contiguous();
    AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "update_rows", [&] {
        FLATCORE_RUN(X, tall_update<scalar_t>, X.size(0), Y.size(0), X.size(1),
                     factors.const_data_ptr<scalar_t>(), Y.const_data_ptr<scalar_t>(), Y.stride(0),
                     X.mutable_data_ptr<scalar_t>(), X.stride(0));
    });
}

void combine_rows(const at::Tensor& X, const at::Tensor& B, const at::Tensor& Y) {
    if (!suits_kernel(X, Y) || Y.size(0) > kMostFactors) {
        const Float32Products full_precision(X.device(), Precision::full);
        at::Tensor out = X;
        at::mm_out(out, B, Y);
        return;
    }
    const at::Tensor factors = B.contiguous();
    AT_DISPATCH_FLOATING_TYPES(X.scalar_type(), "combine_rows", [&] {
        FLATCORE_RUN(X, tall_combine<scalar_t>, X.size(0), Y.size(0), X.size(1),
                     factors.const_data_ptr<scalar_t>(), Y.const_data_ptr<scalar_t>(), Y.stride(0),
                     X.mutable_data_ptr<scalar_t>(), X.stride(0));
    });
}

at::Tensor inner_products_each(const at::Tensor& Y, const at::Tensor& X) {
    if (!on_gpu(X)) return at::bmm(Y, X.unsqueeze(2)).squeeze(2);
    std::vector<at::Tensor> products;
    for (int64_t k = 0; k < X.size(0); ++k)
        products.push_back(inner_products(X.narrow(0, k, 1), Y.select(0, k)).squeeze(0));
    return at::stack(products);
}

void update_each_row(const at::Tensor& X, const at::Tensor& B, const at::Tensor& Y) {
    if (!on_gpu(X)) {
        X.unsqueeze(1).baddbmm_(B.unsqueeze(1), Y, 1, -1);
        return;
    }
    for (int64_t k = 0; k < X.size(0); ++k) update_rows(X.narrow(0, k, 1), B.narrow(0, k, 1), Y.select(0, k));
}

int64_t panel_entries(const at::Device& device) {
    return device.is_cpu() ? int64_t{1} << 22 : int64_t{1} << 25;
}

}  // namespace flatcore
