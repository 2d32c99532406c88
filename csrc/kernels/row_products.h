// Inner products of rows with those of K directions, for .cu files.
#pragma once

#include "cuda_rows.h"
#include "fused_attention.h"

namespace flatcore::cuda {

// out_n = <a_n, b> of each row + base_n. a or base may be null: zero.
template <class T>
struct RowProducts {
    int64_t K, rows, width;
    DirectionArray<const T> a;
    const T *b, *base;  // (rows, width), (K, rows)
    T* out;             // (K, rows)

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const DirectionRow r = direction_row(task, K, rows);
        T sum = 0;
        if (a.data)
            sum = dot<N, Team>(width, a.data + r.at / rows * a.stride + r.row * width, b + r.row * width);
        if (Team::rank() == 0) out[r.at] = base ? sum + base[r.at] : sum;
    }
};

template <class T>
void row_products(const RowProducts<T>& products, void* stream) {
    const auto& [K, rows, width, a, b, base, out] = products;
    launch_rows<T>(K * rows, width, fits_packs<T>({a.data, b}, {width, a.stride}), stream, products);
}

}  // namespace flatcore::cuda
