// What the kernels of fused attention share: the operands of a pair of tiles and the products that make
// logits, probabilities and their derivatives of them. For .cu files.
//
// A block owns a tile of queries or of keys and passes over tiles of the other. With
//   queries: point q, image dout;   keys: point k, image v
// every quantity of a pair is a sum of products own x other' of the same kind, whichever side the block owns:
//   z = scale point point' + mask,              dp = image image'
//   tz = scale (tpoint point' + point tpoint'), tdp = timage image' + image timage'
#pragma once

#include <algorithm>
#include <type_traits>

#include "fused_attention.inl"
#include "tile_product.h"

namespace flatcore::cuda {

template <class T>
struct AttentionSide {
    const T *point = nullptr, *image = nullptr;
    DirectionArray<const T> tpoint = {}, timage = {};
    int64_t length = 0;
};

// Arguments of a kernel.
template <class T>
struct AttentionSweep {
    AttentionShape shape;
    AttentionMask<T> mask;
    AttentionSide<T> queries, keys;
    int64_t K = 1;
    const T *normaliser = nullptr, *dout_o = nullptr, *mean = nullptr;  // as in fused_attention.h
    const T* mean_w = nullptr;                                          // (K, rows)
};

template <class T>
__device__ const T* direction(const DirectionArray<const T>& array, int64_t n) {
    return array.data ? array.data + n * array.stride : nullptr;
}

template <class Product, int W, bool OwnKeys>
struct AttentionPair {
    using T = typename Product::Element;
    using Logits = Sums<Product, Product::kTile>;

    const AttentionSweep<T>& sweep;
    TileMemory<typename Product::Word> memory;
    int64_t head;
    int own_tile, other_tile = 0;

    __device__ int64_t own_first() const { return int64_t{own_tile} * Product::kTile; }
    __device__ int64_t other_first() const { return int64_t{other_tile} * Product::kTile; }

    __device__ const AttentionSide<T>& own() const { return OwnKeys ? sweep.keys : sweep.queries; }
    __device__ const AttentionSide<T>& other() const { return OwnKeys ? sweep.queries : sweep.keys; }

    __device__ MatrixRows<Product> own_rows(const T* data, int64_t width) const {
        return MatrixRows<Product>(data + head * own().length * width, own_first(), own().length, width);
    }
    __device__ MatrixRows<Product> other_rows(const T* data, int64_t width) const {
        return MatrixRows<Product>(data + head * other().length * width, other_first(), other().length,
                                   width);
    }
    __device__ MatrixRows<Product> other_points(const T* data) const {
        return other_rows(data, sweep.shape.width);
    }
    __device__ MatrixRows<Product> other_images(const T* data) const {
        return other_rows(data, sweep.shape.value_width);
    }

    // In the tile, of an element of the logits.
    static __device__ int query(int i, int j) { return OwnKeys ? Logits::column(j) : Logits::row(i); }
    static __device__ int key(int i, int j) { return OwnKeys ? Logits::row(i) : Logits::column(j); }
    __device__ int64_t first_query() const { return OwnKeys ? other_first() : own_first(); }
    __device__ int64_t first_key() const { return OwnKeys ? own_first() : other_first(); }

    // A value of each query, of (rows) or of direction n of (K, rows), at an element of the logits; zero for
    // null and for queries that do not exist. Read where it is used: the cache is nearer than spilled
    // registers.
    struct QueryValues {
        const T* of_tile;
        int count;
        __device__ T operator()(int i, int j) const {
            return query(i, j) < count ? of_tile[query(i, j)] : T(0);
        }
    };
    __device__ QueryValues query_values(const T* values, int64_t n) const {
        if (!values) return {nullptr, 0};
        const int64_t heads = sweep.shape.batches * sweep.shape.heads, queries = sweep.shape.queries;
        const int64_t left = queries - first_query();
        return {values + (n * heads + head) * queries + first_query(),
                left < Product::kTile ? static_cast<int>(left) : Product::kTile};
    }
    __device__ QueryValues mean_tz(int64_t n) const { return query_values(sweep.mean, n); }

    // c += a x b' + a2 x b2' where neither of a pair is null.
    __device__ void add_two(Logits& c, const T* a, const T* b, const T* a2, const T* b2,
                            int64_t width) const {
        FLATCORE_NO_UNROLL
        for (int term = 0; term < 2; ++term) {
            const T *left = term ? a2 : a, *right = term ? b2 : b;
            if (left && right)
                add_product_of_rows<Product, W>(c, own_rows(left, width), other_rows(right, width), memory);
        }
    }

    __device__ void logits(Logits& z) const {
        z.zero();
        add_product_of_rows<Product, W>(z, own_rows(own().point, sweep.shape.width),
                                        other_points(other().point), memory);
        const T scale = static_cast<T>(sweep.shape.scale);
        Logits::each([&](int i, int j) {
            z.value[i][j] = scale * z.value[i][j] + body::attention_bias(sweep.shape, sweep.mask, head,
                                                                         first_query() + query(i, j),
                                                                         first_key() + key(i, j));
        });
    }
    __device__ void probabilities(Logits& p) const {
        logits(p);
        const QueryValues peak = query_values(sweep.normaliser, 0), share = query_values(sweep.normaliser, 1);
        Logits::each([&](int i, int j) {
            p.value[i][j] = body::attention_probability(p.value[i][j], peak(i, j), share(i, j));
        });
    }
    // u = dp - <p, dp>
    __device__ void centred_dp(Logits& u) const {
        u.zero();
        add_product_of_rows<Product, W>(u, own_rows(own().image, sweep.shape.value_width),
                                        other_images(other().image), memory);
        const QueryValues mean_dp = query_values(sweep.dout_o, 0);
        Logits::each([&](int i, int j) { u.value[i][j] -= mean_dp(i, j); });
    }
    __device__ void logit_tangent(Logits& tz, int64_t n) const {
        tz.zero();
        add_two(tz, direction(own().tpoint, n), other().point, own().point, direction(other().tpoint, n),
                sweep.shape.width);
        const T scale = static_cast<T>(sweep.shape.scale);
        Logits::each([&](int i, int j) { tz.value[i][j] *= scale; });
    }
    // From w without tdp to tdz. The products add to w where it is: a sum of their own would need more
    // registers.
    __device__ void adjoint_logits(Logits& w, const Logits& p, int64_t n) const {
        add_two(w, direction(own().timage, n), other().image, own().image, direction(other().timage, n),
                sweep.shape.value_width);
        const QueryValues mean_w = query_values(sweep.mean_w, n);
        Logits::each([&](int i, int j) {
            w.value[i][j] = body::softmax_centred(p.value[i][j], w.value[i][j], mean_w(i, j));
        });
    }
    // tz becomes w without tdp.
    __device__ void second_order(Logits& tz, const Logits& u, int64_t n) const {
        const QueryValues mean = mean_tz(n);
        Logits::each([&](int i, int j) {
            tz.value[i][j] = body::attention_second_order(T(0), tz.value[i][j], mean(i, j), u.value[i][j]);
        });
    }

    // value(i, result, place) to the own rows of out.
    template <class F>
    __device__ void write(const Sums<Product, W>& result, T* out, int64_t width, const F& value) const {
        using Result = Sums<Product, W>;
        const int64_t left = own().length - own_first();
        const int count = left < Product::kTile ? static_cast<int>(left) : Product::kTile;
        const int64_t first = (head * own().length + own_first()) * width;
        Result::each([&](int i, int j) {
            const int64_t at = first + Result::row(i) * width + Result::column(j);
            if (Result::row(i) < count && Result::column(j) < width)
                out[at] = value(i, result.value[i][j], at);
        });
    }
};

// Directions that a block works on at once: what their results leave registers for.
template <int W>
inline constexpr int kDirectionsAtOnce = W == 128 ? 1 : 2;

// Blocks of a launch; what is left is done by striding. Few in the emulation, so that tests get there.
#if defined(FLATCORE_CUDA_SHIM)
inline constexpr int64_t kMostBlocks = 7;
#else
inline constexpr int64_t kMostBlocks = int64_t{1} << 30;
#endif

inline dim3 grid_for(int64_t items) { return dim3(static_cast<unsigned>(std::min(items, kMostBlocks))); }

// f(product, width), both as values of types.
template <class T, class F>
void visit_tiles(ProductPrecision precision, const AttentionShape& shape, const F& f) {
    const auto with_width = [&](auto product) {
        const int64_t width = std::max(shape.width, shape.value_width);
        if (width <= 32)
            f(product, std::integral_constant<int, 32>{});
        else if (width <= 64)
            f(product, std::integral_constant<int, 64>{});
        else
            f(product, std::integral_constant<int, 128>{});
    };
    if constexpr (std::is_same_v<T, float>) {
        if (precision == ProductPrecision::tf32) return with_width(TensorProduct<Tf32>{});
        if (precision == ProductPrecision::bf16) return with_width(TensorProduct<Bf16>{});
    }
    with_width(PlainProduct<T>{});
}

}  // namespace flatcore::cuda
