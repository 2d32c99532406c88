// The rows of a Krylov basis in two tensors: the first in full precision where the vectors are, the others
// maybe in 16 bits, in the memory of the host or in a mapped file. Those are converted in panels of columns,
// so that the extra memory stays bounded.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "../krylov/matrix.h"
#include "mapped_rows.h"

namespace flatcore {

class TensorBasis {
 public:
    using Block = at::Tensor;
    using Matrix = krylov::Matrix;
    using Numbers = at::Tensor;  // a matrix of float64 where the vectors are, until it is fetched

    // head (h, P), with h >= 0, has the precision and device of all blocks. `scale`: stored is a row times
    // it. `mapped`: the file that the tail lies in, if it does.
    TensorBasis(at::Tensor head, at::Tensor tail, double scale, MappedRows mapped = {})
        : head_(std::move(head)), tail_(std::move(tail)), scale_(scale), mapped_(std::move(mapped)) {}

    int64_t capacity() const { return head_.size(0) + tail_.size(0); }
    double rounding() const;
    Block load(int64_t first, int64_t n) const;
    std::vector<double> store(int64_t first, const Block& X);
    // The lengths of the errors, (1, n); undefined where nothing is rounded.
    Numbers put(int64_t first, const Block& X);
    krylov::Projection project(const Block& W, int64_t m) const;
    krylov::ProjectionThere<Numbers> project_there(const Block& W, int64_t m) const;
    void update(Block& W, const Matrix& B, int64_t m) const;
    void combine_into(Block X, const Matrix& B, int64_t m) const;
    std::vector<double> rotate(int64_t first, int64_t m, const Matrix& B);

 private:
    // The basis' first m rows part by part, in full precision: (rows, first row, first column).
    void for_each_panel(int64_t first, int64_t m,
                        const std::function<void(const at::Tensor&, int64_t, int64_t)>& use) const;
    void rest(int64_t first_row, int64_t rows, int64_t first_column, int64_t n) const;
    at::Tensor columns(int64_t first_row, int64_t rows, int64_t first_column, int64_t n) const;
    void update_by(const Block& W, const at::Tensor& B, int64_t m) const;
    int64_t panel_columns(int64_t rows) const;

    at::Tensor head_, tail_;
    double scale_;
    MappedRows mapped_;
};

}  // namespace flatcore
