#include "tensor_space.h"

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>

#include "../kernels/probes.h"

namespace flatcore {

at::Tensor TensorSpace::allocate(int64_t p) const { return at::empty({p, P_}, options_); }

at::Tensor TensorSpace::allocate_pair(int64_t which, int64_t p) const {
    at::Tensor block = mapped_.block(which, p);
    return block.defined() ? block : allocate(p);
}

at::Tensor TensorSpace::random(int64_t p) {
    at::Tensor host = at::empty({p, P_}, options_.device(at::kCPU));
    if (host.scalar_type() == at::kFloat)
        normal_rows(seed_, random_rows_, p, P_, host.mutable_data_ptr<float>());
    else
        normal_rows(seed_, random_rows_, p, P_, host.mutable_data_ptr<double>());
    random_rows_ += p;
    return host.to(options_);
}

at::Tensor TensorSpace::select(const Block& X, const std::vector<int64_t>& indices) const {
    Block Y = allocate(static_cast<int64_t>(indices.size()));
    for (size_t i = 0; i < indices.size(); ++i)
        Y.select(0, static_cast<int64_t>(i)).copy_(X.select(0, indices[i]));
    return Y;
}

void TensorSpace::scatter(Block& X, const std::vector<int64_t>& indices, const Block& Y) const {
    for (size_t i = 0; i < indices.size(); ++i)
        X.select(0, indices[i]).copy_(Y.select(0, static_cast<int64_t>(i)));
}

at::Tensor TensorSpace::apply(const Block& X) const {
    // The recurrence overwrites what it gets, so a result that is the operator's own storage, or X's, is
    // copied.
    at::Tensor Y = apply_(X).detach().to(options_);
    const bool own = Y.storage().use_count() == 1 && !Y.is_alias_of(X);
    return own && Y.is_contiguous() ? Y : Y.clone(at::MemoryFormat::Contiguous);
}

void TensorSpace::for_each_piece(const Block& X, const Block& Y,
                                 const std::function<void(at::Tensor, at::Tensor)>& use) const {
    if (!mapped_.holds(X) && !mapped_.holds(Y)) return use(X, Y);
    const int64_t rows = std::max<int64_t>({X.size(0), Y.size(0), 1});
    const int64_t piece = std::max<int64_t>(1, (int64_t{1} << 22) / rows);
    for (int64_t first = 0; first < P_; first += piece) {
        const int64_t n = std::min(piece, P_ - first);
        const at::Tensor x = X.narrow(1, first, n), y = Y.narrow(1, first, n);
        use(x, y);
        rest(x);
        rest(y);
    }
    rest(X);
    rest(Y);
}

krylov::Matrix TensorSpace::gram(const Block& X, const Block& Y) const {
    Matrix sum(X.size(0), Y.size(0));
    for_each_piece(X, Y, [&](const at::Tensor& x, const at::Tensor& y) { krylov::add(sum, gram_of(x, y)); });
    return sum;
}

std::vector<double> TensorSpace::lengths(const Block& X) const {
    std::vector<double> result;
    for (int64_t i = 0; i < X.size(0); ++i) {
        const Block row = X.narrow(0, i, 1);
        result.push_back(std::sqrt(gram(row, row)(0, 0)));
    }
    return result;
}

void TensorSpace::update(Block& X, const Matrix& B, const Block& Y) const {
    if (B.rows == 0 || B.cols == 0) return;
    const at::Tensor coefficients = to_tensor(B);
    for_each_piece(X, Y, [&](at::Tensor x, const at::Tensor& y) { x.addmm_(coefficients, y, 1, -1); });
}

at::Tensor TensorSpace::combine(const Matrix& B, const Block& Y) const { return at::mm(to_tensor(B), Y); }

void TensorSpace::combine_into(Block X, const Matrix& B, const Block& Y) const {
    at::mm_out(X, to_tensor(B), Y);
}

void TensorSpace::rotate(Block X, const Matrix& B) const {
    // By column pieces: the temporary stays small beside the basis.
    const at::Tensor coefficients = to_tensor(B);
    const int64_t piece = std::max<int64_t>(1, (int64_t{1} << 22) / std::max<int64_t>(B.rows, 1));
    for (int64_t first = 0; first < P_; first += piece) {
        const at::Tensor part = X.narrow(1, first, std::min(piece, P_ - first));
        part.narrow(0, 0, B.rows).copy_(at::mm(coefficients, part));
        rest(part);
    }
    rest(X);
}

krylov::Spectral TensorSpace::eigh(const Matrix& T) const {
    at::Tensor host = at::empty({T.rows, T.cols}, at::kDouble);
    std::copy(T.data.begin(), T.data.end(), host.mutable_data_ptr<double>());
    const auto [values, vectors] = at::linalg_eigh(host);
    const double* first = values.const_data_ptr<double>();
    return {std::vector<double>(first, first + values.numel()), to_matrix(vectors)};
}

at::Tensor TensorSpace::allocate_bases(int64_t K, int64_t steps) const {
    return at::empty({K, steps, P_}, options_);
}

krylov::Matrix TensorSpace::gram_each(const Block& bases, int64_t j, const Block& X) const {
    return to_matrix(at::bmm(bases.narrow(1, 0, j), X.unsqueeze(2)).squeeze(2));
}

void TensorSpace::update_each(Block& X, const Matrix& B, const Block& bases, int64_t j) const {
    at::Tensor rows = X.unsqueeze(1);
    rows.baddbmm_(to_tensor(B).unsqueeze(1), bases.narrow(1, 0, j), 1, -1);
}

std::vector<double> TensorSpace::dot_each(const Block& X, const Block& Y) const {
    return to_matrix(at::bmm(X.unsqueeze(1), Y.unsqueeze(2)).squeeze(2)).data;
}

void TensorSpace::scale_each(Block& X, const std::vector<double>& factors) const {
    Matrix column(static_cast<int64_t>(factors.size()), 1);
    column.data = factors;
    X.mul_(to_tensor(column));
}

}  // namespace flatcore
