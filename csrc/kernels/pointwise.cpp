#include "pointwise.h"

#include <algorithm>

#include "parallel.h"
#include "pointwise.inl"

namespace flatcore {
namespace {

// Elements of d1 and h held in the first-level cache while all K directions pass over them.
constexpr int64_t kTile = 2048;
constexpr int64_t kGrain = 4;  // tiles per thread below which a second thread costs more than it saves

template <class F, class T>
FLATCORE_CLONES void forward_leaf(F f, int64_t n, const T* __restrict z, T* __restrict y, T* __restrict d1,
                                  T* __restrict d2) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) body::unary_forward(i, f, z, y, d1, d2);
}

template <bool First, bool Second, bool Accumulate, class T>
FLATCORE_CLONES void adjoint_leaf(int64_t n, const T* __restrict d1, const T* __restrict td,
                                  const T* __restrict h, const T* __restrict t, T* __restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T value = body::adjoint<First, Second>(i, d1, td, h, t);
        out[i] = Accumulate ? out[i] + value : value;
    }
}

template <bool First, bool Second, bool Accumulate, class T>
void adjoint_tiles(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t, T* out) {
    const auto at = [](const T* p, int64_t offset) { return p ? p + offset : nullptr; };
    const int64_t tiles = (n + kTile - 1) / kTile;
    // Tiles times directions is the work: with many directions one tile is enough for a thread.
    parallel_for(
        0, tiles, std::max<int64_t>(1, kGrain / std::max<int64_t>(K, 1)), [&](int64_t first, int64_t last) {
            for (int64_t tile = first; tile < last; ++tile) {
                const int64_t start = tile * kTile, size = std::min(kTile, n - start);
                for (int64_t k = 0; k < K; ++k) {
                    const int64_t offset = k * n + start;
                    adjoint_leaf<First, Second, Accumulate>(size, at(d1, start), at(td, offset), at(h, start),
                                                            at(t, offset), out + offset);
                }
            }
        });
}

}  // namespace

bool is_curved(Function function) {
    return visit_function(function, {}, [](const auto& f) { return f.curved; });
}

template <class T>
void unary_forward(Function function, const Constants& constants, int64_t n, const T* z, T* y, T* d1, T* d2) {
    visit_function(function, constants, [&](const auto& f) {
        const int64_t tiles = (n + kTile - 1) / kTile;
        parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
            const int64_t start = first * kTile, size = std::min(last * kTile, n) - start;
            forward_leaf(f, size, z + start, y + start, d1 + start, d2 ? d2 + start : nullptr);
        });
    });
}

template <class T>
void scale_directions(int64_t K, int64_t n, const T* d, const T* t, T* out) {
    adjoint_tiles<true, false, false>(K, n, d, t, static_cast<const T*>(nullptr),
                                      static_cast<const T*>(nullptr), out);
}

template <class T>
void adjoint_directions(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t,
                        bool accumulate, T* out) {
    const auto run = [&](auto first, auto second) {
        if (accumulate)
            adjoint_tiles<first.value, second.value, true>(K, n, d1, td, h, t, out);
        else
            adjoint_tiles<first.value, second.value, false>(K, n, d1, td, h, t, out);
    };
    if (td && h)
        run(std::true_type{}, std::true_type{});
    else if (td)
        run(std::true_type{}, std::false_type{});
    else
        run(std::false_type{}, std::true_type{});
}

#define INSTANTIATE(T)                                                                      \
    template void unary_forward(Function, const Constants&, int64_t, const T*, T*, T*, T*); \
    template void scale_directions(int64_t, int64_t, const T*, const T*, T*);               \
    template void adjoint_directions(int64_t, int64_t, const T*, const T*, const T*, const T*, bool, T*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
