// Inner products of rows with those of K directions, for .cu files.
#pragma once

#include "cuda_rows.h"
#include "fused_attention.inl"

namespace flatcore::cuda {

// out_n = <a_n, b> of each row of attention's results + base_n. a or base may be null: zero.
template <class T>
struct RowProducts {
    int64_t K;
    AttentionShape shape;
    HeadArray<const T> a;
    const T *b, *base;  // (rows, value_width), (K, rows)
    T* out;             // (K, rows)

    FLATCORE_HOST_DEVICE int64_t rows() const { return shape.batches * shape.heads * shape.queries; }

    __device__ const T* of_a(int64_t direction, int64_t row) const {
        const auto [of_all, query] = divide(row, shape.queries);
        const auto [batch, head] = divide(of_all, shape.heads);
        const body::AttentionItem item{static_cast<int>(batch), static_cast<int>(head), 0,
                                       static_cast<int>(direction), 1};
        return body::rows_of(a, item, 0) + query * a.row;
    }
    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const int64_t width = shape.value_width;
        const DirectionRow r = direction_row(task, K, rows());
        T sum = 0;
        if (a.data) sum = dot<N, Team>(width, of_a(r.k, r.row), b + r.row * width);
        if (Team::rank() == 0) out[r.at] = base ? sum + base[r.at] : sum;
    }
};

template <class T>
void row_products(const RowProducts<T>& products, void* stream) {
    const HeadArray<const T>& a = products.a;
    const int64_t width = products.shape.value_width;
    launch_rows<T>(products.K * products.rows(), width,
                   fits_packs<T>({a.data, products.b}, {width, a.direction, a.batch, a.head, a.row}), stream,
                   products);
}

}  // namespace flatcore::cuda
