#include "tensor_space.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "random_rows.h"
#include "tall_rows.h"

namespace flatcore {

at::Tensor TensorSpace::allocate(int64_t p) const { return at::empty({p, P_}, options_); }

at::Tensor TensorSpace::allocate_pair(int64_t which, int64_t p) const {
    // A file is memory of the host.
    at::Tensor block = options_.device().is_cpu() ? mapped_.block(which, p) : at::Tensor();
    return block.defined() ? block : allocate(p);
}

at::Tensor TensorSpace::random(int64_t p) {
    random_rows_ += p;
    return gaussian_rows(seed_, random_rows_ - p, p, P_, options_);
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
#if defined(__GLIBC__)
    // Who keeps the basis in a file has no memory to spare for freed blocks that the allocator holds back.
    if (mapped_.holds(X)) malloc_trim(0);
#endif
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

at::Tensor TensorSpace::gram_there(const Block& X, const Block& Y) const {
    Numbers sum;
    for_each_piece(X, Y, [&](const at::Tensor& x, const at::Tensor& y) {
        const Numbers products = inner_products(x, y);
        sum = sum.defined() ? sum.add_(products) : products;
    });
    return sum;
}

krylov::Projection TensorSpace::project(const Block& X, const Block& Y) const {
    const Numbers inside = gram_there(X, Y);
    update(X, inside, Y);
    std::vector<Matrix> found = fetch({inside, gram_there(X, X)});
    return {std::move(found[0]), std::move(found[1])};
}

krylov::CholeskyRows<at::Tensor, at::Tensor> TensorSpace::cholesky_rows(const Block& X,
                                                                        const Numbers& gram) const {
    // Of these none waits for a device, nor looks at what it finds.
    const Numbers factor = std::get<0>(at::linalg_cholesky_ex(gram));
    const Numbers identity = at::eye(gram.size(0), gram.options());
    const Numbers inverse = at::linalg_solve_triangular(factor, identity, /*upper=*/false);
    return {combine(inverse.to(options_).contiguous(), X), factor};
}

std::vector<double> TensorSpace::lengths(const Block& X) const {
    std::vector<Numbers> squares;
    for (int64_t i = 0; i < X.size(0); ++i) {
        const Block row = X.narrow(0, i, 1);
        squares.push_back(gram_there(row, row));
    }
    std::vector<double> result;
    for (const Matrix& square : fetch(squares)) result.push_back(std::sqrt(square(0, 0)));
    return result;
}

void TensorSpace::update(const Block& X, const Numbers& B, const Block& Y) const {
    if (B.numel() == 0) return;
    const at::Tensor coefficients = B.to(options_).contiguous();
    for_each_piece(X, Y, [&](const at::Tensor& x, const at::Tensor& y) { update_rows(x, coefficients, y); });
}

at::Tensor TensorSpace::combine(const Numbers& B, const Block& Y) const {
    const Block X = at::empty({B.size(0), Y.size(1)}, options_);
    combine_rows(X, B, Y);
    return X;
}

void TensorSpace::combine_into(const Block& X, const Matrix& B, const Block& Y) const {
    combine_rows(X, place(B), Y);
}

void TensorSpace::rotate(Block X, const Matrix& B) const {
    // By column pieces: the temporary stays small beside the basis.
    const at::Tensor coefficients = place(B);
    const int64_t piece =
        std::max<int64_t>(1, panel_entries(options_.device()) / std::max<int64_t>(B.rows, 1));
    for (int64_t first = 0; first < P_; first += piece) {
        const at::Tensor part = X.narrow(1, first, std::min(piece, P_ - first));
        part.narrow(0, 0, B.rows).copy_(combine(coefficients, part));
        rest(part);
    }
    rest(X);
}

krylov::Spectral TensorSpace::eigh(const Matrix& T) const {
    at::Tensor host = at::empty({T.rows, T.cols}, at::kDouble);
    std::copy(T.data.begin(), T.data.end(), host.mutable_data_ptr<double>());
    const auto [values, vectors] = at::linalg_eigh(host);
    const double* first = values.const_data_ptr<double>();
    Matrix columns(T.rows, T.cols);
    const at::Tensor rows = vectors.contiguous();
    std::copy_n(rows.const_data_ptr<double>(), rows.numel(), columns.data.begin());
    return {std::vector<double>(first, first + values.numel()), std::move(columns)};
}

at::Tensor TensorSpace::allocate_bases(int64_t K, int64_t steps) const {
    return at::empty({K, steps, P_}, options_);
}

std::vector<double> TensorSpace::squares(const Block& X) const {
    return to_matrix(inner_products_each(X.unsqueeze(1), X)).data;
}

krylov::ProjectionsOfEach TensorSpace::project_each(const Block& X, const Block& bases, int64_t j) const {
    const at::Tensor V = bases.narrow(1, 0, j);
    const at::Tensor inside = inner_products_each(V, X);
    update_each_row(X, inside.to(options_), V);
    const at::Tensor again = inner_products_each(V, X);
    update_each_row(X, again.to(options_), V);
    std::vector<Matrix> found =
        fetch({inside, again.narrow(1, j - 1, 1), inner_products_each(X.unsqueeze(1), X)});
    return {std::move(found[0]), std::move(found[1].data), std::move(found[2].data)};
}

void TensorSpace::scale_each(Block& X, const std::vector<double>& factors) const {
    Matrix column(static_cast<int64_t>(factors.size()), 1);
    column.data = factors;
    X.mul_(place(column));
}

}  // namespace flatcore
