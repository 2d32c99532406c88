// Attention through the four sweeps on a device, tile by tile, with memory linear in the lengths.
// Mathematics: engine/rules/attention.cpp; closed forms and cost: fused_attention.cu.
//
// Per head of each batch: q (queries, width), k (keys, width), v (keys, value_width), o (queries,
// value_width). These arrays and dout are contiguous, heads in front of rows. K directions of them have any
// strides but along a row (HeadArray), so that they are read and written as models lay them, heads side by
// side or as parts of one matrix. A row is a query of a head; `rows` = batches * heads * queries.
//
// To keep between the sweeps:
//   after forward       o, normaliser (2, rows)             for all later sweeps of the batch
//   after backward      dout, dout_o (rows)                 for adjoints with second-derivative terms
//   tangent to adjoint  mean, dout_to (K, rows)             of the same K directions
// The backward sweep itself is the adjoint for one direction without second-derivative terms.
//
// The normaliser is the peak of each row's logits, then 1 / sum of exp(logit - peak). Their log-sum-exp would
// be one number, but loses the sum where the peak is large, as in rows that an additive mask hides by the
// lowest number there is.
// A query that sees no key has o = 0, zero derivatives, and zeros for a normaliser. Infinities in q, k, v are
// not caught. Results depend neither on K nor on how blocks are scheduled. Outputs must not overlap inputs.
#pragma once

#include <cstdint>

namespace flatcore {

// Of the operands of products, with sums in float32 (double is always full). The logits are computed anew in
// each sweep, so the normaliser should come from the same precision; otherwise rows of p sum to one only up
// to the rounding of the logits.
enum class ProductPrecision { full, tf32, bf16 };

struct AttentionShape {
    int64_t batches, heads, queries, keys, width, value_width;
    bool causal;  // query i sees the keys j <= i
    double scale;
};

// False: the caller needs another way.
inline bool fused_attention_supported(const AttentionShape& shape) {
    constexpr int64_t kWidest = 128;
    return shape.width <= kWidest && shape.value_width <= kWidest;
}

// At most one of the pointers. Strides in elements over (batch, head, query, key), 0 where broadcast.
template <class T>
struct AttentionMask {
    const bool* keep = nullptr;
    const T* added = nullptr;
    int64_t strides[4] = {0, 0, 0, 0};
};

template <class T>
struct AttentionInputs {
    AttentionShape shape;
    AttentionMask<T> mask = {};
    const T *q = nullptr, *k = nullptr, *v = nullptr;
};

// Strides in elements between directions, batches, heads and rows; elements of a row follow each other. Null:
// zero, or not asked for.
template <class T>
struct HeadArray {
    T* data = nullptr;
    int64_t direction = 0, batch = 0, head = 0, row = 0;
};

// Rows of a HeadArray are nearer to each other: places within a tile are 32 bits.
inline constexpr int64_t kFarthestRow = int64_t{1} << 24;

template <class T>
struct AttentionTangents {
    HeadArray<const T> tq = {}, tk = {}, tv = {};
};

template <class T>
struct AttentionAdjoint {
    AttentionTangents<T> tangents = {};  // used with dout only
    HeadArray<const T> tdo = {};         // may be null
    const T *o = nullptr, *normaliser = nullptr;
    const T* dout = nullptr;     // null: no second-derivative terms
    const T* dout_o = nullptr;   // the next three are used with dout only
    const T* mean = nullptr;     // null where tq and tk are
    const T* dout_to = nullptr;  // null where the tangents are
    T* workspace = nullptr;      // (K, rows)
    HeadArray<T> tdq = {}, tdk = {}, tdv = {};
};

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// `stream` is a cudaStream_t. Nothing is launched for results without elements.

// o and normaliser.
template <class T>
void fused_attention_forward(const AttentionInputs<T>& inputs, ProductPrecision precision, T* o,
                             T* normaliser, void* stream);

// dout_o, (rows): <dout, o> of each row.
template <class T>
void fused_attention_backward(const AttentionShape& shape, const T* dout, const T* o, T* dout_o,
                              void* stream);

// to; mean, (K, rows), unless tq and tk are null; dout_to, (K, rows), unless dout is null.
template <class T>
void fused_attention_tangent(int64_t K, const AttentionInputs<T>& inputs, ProductPrecision precision,
                             const T* o, const T* normaliser, const AttentionTangents<T>& tangents,
                             HeadArray<T> to, T* mean, const T* dout, T* dout_to, void* stream);

// tdq, tdk, tdv, each where it is not null.
template <class T>
void fused_attention_adjoint(int64_t K, const AttentionInputs<T>& inputs, ProductPrecision precision,
                             const AttentionAdjoint<T>& adjoint, void* stream);

}  // namespace cuda
#endif

}  // namespace flatcore
