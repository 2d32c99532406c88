// The spaces of csrc/krylov over ATen tensors: rows of length P, contiguous, float32 or float64, on any
// device.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "../krylov/matrix.h"
#include "../krylov/probe_lanczos.h"
#include "tensor_basis.h"
#include "transfers.h"

namespace flatcore {

class TensorSpace {
 public:
    using Block = at::Tensor;
    using Basis = TensorBasis;
    using Matrix = krylov::Matrix;
    using Numbers = at::Tensor;  // a matrix of float64 where the vectors are, until it is fetched
    // (p, P) contiguous -> (p, P), X -> X A
    using Apply = std::function<at::Tensor(const at::Tensor&)>;

    // mapped: a file with room for the blocks of `allocate_pair`.
    TensorSpace(Apply apply, int64_t P, at::TensorOptions options, uint64_t seed, MappedRows mapped = {})
        : apply_(std::move(apply)), P_(P), options_(options), seed_(seed), mapped_(std::move(mapped)) {}

    int64_t dimension() const { return P_; }
    at::Device device() const { return options_.device(); }
    double epsilon() const { return options_.dtype() == at::kFloat ? 0x1.0p-23 : 0x1.0p-52; }
    int64_t count(const Block& X) const { return X.size(0); }
    Block allocate(int64_t p) const;
    Block allocate_pair(int64_t which, int64_t p) const;
    void rest(const Block& X) const { mapped_.rest(X); }
    Block random(int64_t p);
    Block rows(const Block& X, int64_t first, int64_t n) const { return X.narrow(0, first, n); }
    Block select(const Block& X, const std::vector<int64_t>& indices) const;
    void scatter(Block& X, const std::vector<int64_t>& indices, const Block& Y) const;
    void assign(Block X, const Block& Y) const { X.copy_(Y); }
    Block apply(const Block& X) const;
    Numbers gram_there(const Block& X, const Block& Y) const;
    std::vector<Matrix> fetch(const std::vector<Numbers>& numbers) const { return flatcore::fetch(numbers); }
    Matrix gram(const Block& X, const Block& Y) const { return to_matrix(gram_there(X, Y)); }
    krylov::Projection project(const Block& X, const Block& Y) const;
    krylov::CholeskyRows<Block, Numbers> cholesky_rows(const Block& X, const Numbers& gram) const;
    std::vector<double> lengths(const Block& X) const;
    // B from the host, or as Numbers.
    at::Tensor place(const Matrix& B) const { return to_tensor(B, options_); }
    void update(const Block& X, const Matrix& B, const Block& Y) const { update(X, place(B), Y); }
    void update(const Block& X, const Numbers& B, const Block& Y) const;
    Block combine(const Matrix& B, const Block& Y) const { return combine(place(B), Y); }
    Block combine(const Numbers& B, const Block& Y) const;
    void combine_into(const Block& X, const Matrix& B, const Block& Y) const;
    void rotate(Block X, const Matrix& B) const;
    krylov::Spectral eigh(const Matrix& T) const;

    // Bases of K independent recurrences: (K, steps, P).
    Block allocate_bases(int64_t K, int64_t steps) const;
    void assign_each(Block& bases, int64_t j, const Block& X) const { bases.select(1, j).copy_(X); }
    std::vector<double> squares(const Block& X) const;
    krylov::ProjectionsOfEach project_each(const Block& X, const Block& bases, int64_t j) const;
    void scale_each(Block& X, const std::vector<double>& factors) const;

    // Rows of random() drawn so far: with the seed, all there is to know of the generator.
    int64_t random_rows() const { return random_rows_; }
    void set_random_rows(int64_t drawn) { random_rows_ = drawn; }

 private:
    // In one piece, but where X or Y lie in the file in pieces of columns, each of which rests after its use.
    void for_each_piece(const Block& X, const Block& Y,
                        const std::function<void(at::Tensor, at::Tensor)>& use) const;

    Apply apply_;
    int64_t P_;
    at::TensorOptions options_;
    uint64_t seed_;
    int64_t random_rows_ = 0;
    MappedRows mapped_;
};

}  // namespace flatcore
