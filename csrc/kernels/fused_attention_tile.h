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
#include "plain_product.h"
#include "tensor_product.h"

namespace flatcore::cuda {

// All directions share points and images, which are contiguous.
template <class T>
struct AttentionSide {
    HeadArray<const T> point = {}, image = {}, tpoint = {}, timage = {};
    int64_t length = 0;
};

template <class T>
HeadArray<const T> query_points(const AttentionInputs<T>& inputs) {
    return body::contiguous_heads(inputs.q, inputs.shape, inputs.shape.queries, inputs.shape.width);
}
template <class T>
HeadArray<const T> key_points(const AttentionInputs<T>& inputs) {
    return body::contiguous_heads(inputs.k, inputs.shape, inputs.shape.keys, inputs.shape.width);
}
template <class T>
HeadArray<const T> key_images(const AttentionInputs<T>& inputs) {
    return body::contiguous_heads(inputs.v, inputs.shape, inputs.shape.keys, inputs.shape.value_width);
}
template <class T>
HeadArray<T> query_images(T* data, const AttentionShape& shape) {
    return body::contiguous_heads(data, shape, shape.queries, shape.value_width);
}

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

// Of one side; each direction has its own of the last two.
enum class Operand { point, image, tpoint, timage };

template <class Product, bool OwnKeys>
struct AttentionPair {
    using T = typename Product::Element;
    using Rows = MatrixRows<T>;
    using Logits = Sums<Product, Product::kOther>;
    using Result = Sums<Product, Product::kWidth>;

    const AttentionSweep<T>& sweep;
    typename Product::Tiles tiles;
    body::AttentionItem item;
    int other_tile = 0;

    __device__ int64_t head() const { return item.batch * sweep.shape.heads + item.head; }  // of all
    __device__ int directions() const { return Product::kDirections == 1 ? 1 : item.directions; }
    __device__ int64_t own_first() const { return int64_t{item.tile} * Product::kTile; }
    __device__ int64_t other_first() const { return int64_t{other_tile} * Product::kOther; }

    __device__ const AttentionSide<T>& own_side() const { return OwnKeys ? sweep.keys : sweep.queries; }
    __device__ const AttentionSide<T>& other_side() const { return OwnKeys ? sweep.queries : sweep.keys; }

    static __device__ const HeadArray<const T>& array(const AttentionSide<T>& side, Operand which) {
        if (which == Operand::point) return side.point;
        if (which == Operand::image) return side.image;
        return which == Operand::tpoint ? side.tpoint : side.timage;
    }
    __device__ bool own_has(Operand which) const { return array(own_side(), which).data; }
    __device__ bool other_has(Operand which) const { return array(other_side(), which).data; }

    __device__ int64_t width_of(Operand which) const {
        return which == Operand::point || which == Operand::tpoint ? sweep.shape.width
                                                                   : sweep.shape.value_width;
    }
    // Of the item's n-th direction. No rows where the array is null.
    __device__ Rows rows(const AttentionSide<T>& side, Operand which, int n, int64_t first, int tile) const {
        const HeadArray<const T>& from = array(side, which);
        const int64_t width = width_of(which);
        if (!from.data) return Rows(nullptr, 0, 0, width, 0, 0);
        // Points and images are contiguous, which saves registers.
        const bool shared = which == Operand::point || which == Operand::image;
        const T* begin = shared ? from.data + head() * from.head : body::rows_of(from, item, n);
        return Rows(begin, first, side.length, width, from.row, tile);
    }
    __device__ Rows own_rows(Operand which, int n) const {
        return rows(own_side(), which, n, own_first(), Product::kTile);
    }
    __device__ Rows other_rows(Operand which, int n) const {
        return rows(other_side(), which, n, other_first(), Product::kOther);
    }
    // Operands of products. Before: take(item), then take_tile(t) for each tile.
    __device__ auto own(Operand which, int n = 0) const {
        return tiles.own(own_rows(which, n), static_cast<int>(which));
    }
    __device__ auto other(Operand which, int n = 0) const {
        return tiles.other(other_rows(which, n), static_cast<int>(which));
    }
    __device__ void take(const body::AttentionItem& next) {
        item = next;
        tiles.keep_own([&](int which) { return own_rows(static_cast<Operand>(which), 0); });
    }
    __device__ void take_tile(int tile) {
        other_tile = tile;
        tiles.keep_others([&](int which) { return other_rows(static_cast<Operand>(which), 0); });
    }

    // In the tile, of an element of the logits.
    static __device__ int query(int i, int j) { return OwnKeys ? Logits::column(j) : Logits::row(i); }
    static __device__ int key(int i, int j) { return OwnKeys ? Logits::row(i) : Logits::column(j); }
    __device__ int64_t first_query() const { return OwnKeys ? other_first() : own_first(); }
    __device__ int64_t first_key() const { return OwnKeys ? own_first() : other_first(); }

    // A value of each query, of (rows) or of direction n of (K, rows), at an element of the logits; zero for
    // null. A query that does not exist, whose p is zero, may get another's. Read where it is used: the cache
    // is nearer than spilled registers.
    struct QueryValues {
        const T* of_tile;
        int last;
        __device__ T operator()(int i, int j) const {
            const int at = query(i, j);
            // Of several columns: a place that is there takes fewer registers than to know for each whether
            // it is.
            if constexpr (OwnKeys) return of_tile ? of_tile[at < last ? at : last] : T(0);
            return of_tile && at <= last ? of_tile[at] : T(0);
        }
    };
    __device__ QueryValues query_values(const T* values, int64_t n) const {
        const int64_t heads = sweep.shape.batches * sweep.shape.heads, queries = sweep.shape.queries;
        const int64_t left = queries - first_query();
        constexpr int kQueries = OwnKeys ? Product::kOther : Product::kTile;
        return {values ? values + (n * heads + head()) * queries + first_query() : nullptr,
                (left < kQueries ? static_cast<int>(left) : kQueries) - 1};
    }
    __device__ QueryValues mean_tz(int n) const { return query_values(sweep.mean, item.direction + n); }

    // c += own x other' where both are there.
    __device__ void add(Logits& c, Operand of_own, Operand of_other, int n) const {
        if (own_has(of_own) && other_has(of_other)) tiles.add_rows(c, own(of_own, n), other(of_other, n));
    }

    __device__ void logits(Logits& z) const {
        z.zero();
        add(z, Operand::point, Operand::point, 0);
        const T scale = static_cast<T>(sweep.shape.scale);
        Logits::each([&](int i, int j) { z.value[i][j] *= scale; });
        const body::TileBias<T> bias(sweep.shape, sweep.mask, item.batch, item.head, first_query(),
                                     first_key());
        if (bias.nothing(OwnKeys ? Product::kOther : Product::kTile,
                         OwnKeys ? Product::kTile : Product::kOther))
            return;
        Logits::each([&](int i, int j) { z.value[i][j] += bias(query(i, j), key(i, j)); });
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
        add(u, Operand::image, Operand::image, 0);
        const QueryValues mean_dp = query_values(sweep.dout_o, 0);
        Logits::each([&](int i, int j) { u.value[i][j] -= mean_dp(i, j); });
    }
    __device__ void logit_tangent(Logits& tz, int n) const {
        tz.zero();
        add(tz, Operand::tpoint, Operand::point, n);
        add(tz, Operand::point, Operand::tpoint, n);
        const T scale = static_cast<T>(sweep.shape.scale);
        Logits::each([&](int i, int j) { tz.value[i][j] *= scale; });
    }
    // From w without tdp to tdz. The products add to w where it is: a sum of their own would need more
    // registers.
    __device__ void adjoint_logits(Logits& w, const Logits& p, int n) const {
        add(w, Operand::timage, Operand::image, n);
        add(w, Operand::image, Operand::timage, n);
        const QueryValues mean_w = query_values(sweep.mean_w, item.direction + n);
        Logits::each([&](int i, int j) {
            w.value[i][j] = body::softmax_centred(p.value[i][j], w.value[i][j], mean_w(i, j));
        });
    }
    // tz becomes w without tdp.
    __device__ void second_order(Logits& tz, const Logits& u, int n) const {
        const QueryValues mean = mean_tz(n);
        Logits::each([&](int i, int j) {
            tz.value[i][j] = body::attention_second_order(T(0), tz.value[i][j], mean(i, j), u.value[i][j]);
        });
    }

    // value(i, j, result) to the own rows of the item's n-th direction of out.
    template <class F>
    __device__ void write(const Result& result, const HeadArray<T>& out, int n, int64_t width,
                          const F& value) const {
        const int64_t left = own_side().length - own_first();
        const int count = left < Product::kTile ? static_cast<int>(left) : Product::kTile;
        const int stride = static_cast<int>(out.row);
        T* first = body::rows_of(out, item, n) + own_first() * out.row;
        Result::each([&](int i, int j) {
            if (Result::row(i) < count && Result::column(j) < width)
                first[Result::row(i) * stride + Result::column(j)] = value(i, j, result.value[i][j]);
        });
    }
};

// Blocks of a launch; what is left is done by striding. Few in the emulation, so that tests get there.
#if defined(FLATCORE_CUDA_SHIM)
inline constexpr int64_t kMostBlocks = 7;
#else
inline constexpr int64_t kMostBlocks = int64_t{1} << 30;
#endif

// Tiles of one side of all heads, times the groups of directions that a block works on at once.
template <class Product>
int64_t item_count(const AttentionShape& shape, int64_t length, int64_t K) {
    return shape.batches * shape.heads * ceil_div(length, Product::kTile) * ceil_div(K, Product::kDirections);
}

template <class Product, class... Parameters, class... Arguments>
void launch_tiles(void (*kernel)(Parameters...), int64_t items, void* stream, Arguments... arguments) {
    if (items == 0) return;
    launch_with(Product::Tiles::kBytes, kernel, dim3(static_cast<unsigned>(std::min(items, kMostBlocks))),
                dim3(Product::kThreads), stream, arguments...);
}

// f(product), a value of its type.
template <class T, class F>
void visit_products(ProductPrecision precision, const AttentionShape& shape, const F& f) {
    const auto with_width = [&](auto of_width) {
        const int64_t width = std::max(shape.width, shape.value_width);
        if (width <= 32)
            of_width(std::integral_constant<int, 32>{});
        else if (width <= 64)
            of_width(std::integral_constant<int, 64>{});
        else
            of_width(std::integral_constant<int, 128>{});
    };
    if constexpr (std::is_same_v<T, float>) {
        if (precision == ProductPrecision::tf32)
            return with_width([&](auto width) { f(TensorProduct<Tf32, width.value>{}); });
        if (precision == ProductPrecision::bf16)
            return with_width([&](auto width) { f(TensorProduct<Bf16, width.value>{}); });
    }
    with_width([&](auto width) { f(PlainProduct<T, width.value>{}); });
}

}  // namespace flatcore::cuda
