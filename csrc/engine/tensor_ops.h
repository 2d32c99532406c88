// Small helpers that rules share: directions in front, broadcasting undone, GEMM into a given buffer, typed
// pointers.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/select.h>

#include "factor.h"
#include "on_device.h"
#include "program.h"

namespace flatcore {

// (K, *shape)
inline Integers with_directions(int64_t K, const Integers& shape) {
    Integers result{K};
    result.insert(result.end(), shape.begin(), shape.end());
    return result;
}

// The value's own memory layout: dense, channels last for images marked so.
inline at::Tensor dense(const at::Tensor& t, const Value& value) {
    return t.contiguous(value.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// The same for directions: K is the slowest axis, each direction lies like the value.
inline at::Tensor dense_directions(const at::Tensor& t, const Value& value) {
    if (!value.channels_last) return t.contiguous();
    return t.flatten(0, 1).contiguous(at::MemoryFormat::ChannelsLast).unflatten(0, {t.size(0), t.size(1)});
}

// Directions that are contiguous one by one, whatever lies between two of them; an undefined tensor stays so.
inline at::Tensor each_contiguous(const at::Tensor& t) {
    return !t.defined() || t.size(0) == 0 || t.select(0, 0).is_contiguous() ? t : t.contiguous();
}

// Uninitialised directions (K, *shape) in the value's layout; of a permuted view dense, or `ordered` as it
// is.
inline at::Tensor new_directions(int64_t K, const Value& value, const at::TensorOptions& options,
                                 bool ordered = false) {
    if (ordered && !value.order.empty()) {
        Integers sizes{K}, place(value.order.size() + 1, 0);
        for (int64_t axis : value.order) {
            place[static_cast<size_t>(axis) + 1] = static_cast<int64_t>(sizes.size());
            sizes.push_back(value.shape[static_cast<size_t>(axis)]);
        }
        return at::empty(sizes, options).permute(place);
    }
    if (!value.channels_last) return at::empty(with_directions(K, value.shape), options);
    const Integers& s = value.shape;
    return at::empty({K * s[0], s[1], s[2], s[3]}, options, at::MemoryFormat::ChannelsLast)
        .unflatten(0, {K, s[0]});
}

inline at::Tensor new_value(const Value& value, const at::TensorOptions& options) {
    return at::empty(value.shape, options,
                     value.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// Directions t (K, *S) of a value of rank r, seen with `rank` axes behind K, so that they broadcast like the
// value does.
inline at::Tensor align_directions(const at::Tensor& t, int64_t rank) {
    Integers shape = t.sizes().vec();
    shape.insert(shape.begin() + 1, static_cast<size_t>(rank - (t.dim() - 1)), 1);
    return t.reshape(shape);
}

// The transpose of broadcasting: sums directions (K, *from) to (K, *shape).
inline at::Tensor reduce_directions(const at::Tensor& t, const Integers& shape) {
    const int64_t extra = t.dim() - 1 - static_cast<int64_t>(shape.size());
    Integers axes;
    for (int64_t axis = 1; axis < t.dim(); ++axis)
        if (axis <= extra || (shape[static_cast<size_t>(axis - 1 - extra)] == 1 && t.size(axis) != 1))
            axes.push_back(axis);
    at::Tensor result = axes.empty() ? t : t.sum(axes, /*keepdim=*/true);
    return result.reshape(with_directions(t.size(0), shape));
}

// c (+)= a b for matrices of any strides, without a temporary: `accumulate` false writes. Here and below, the
// operands of products large enough are rounded to the given precision (gemm_bf16.h).
void gemm(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate,
          Precision precision = Precision::full);

// c_k (+)= a_k b for all directions at once: c (K, m, n), a (K, m, p), b (p, n). One GEMM where K folds into
// the rows.
void gemm_shared(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate,
                 Precision precision = Precision::full);

// Elements that gemm_each may hold beside its operands for K products (m, inner) (inner, n).
int64_t gemm_each_workspace(bool gpu, int64_t K, int64_t m, int64_t n, int64_t inner);

// c_k (+)= a_k b_k; a or b may be one matrix for all directions. On the CPU large products run one by one in
// place, spread over the threads, and small ones as one batched GEMM; on a GPU all are one call.
void gemm_each(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate,
               Precision precision = Precision::full);

#define FLATCORE_DISPATCH(tensor, name, ...) \
    AT_DISPATCH_FLOATING_TYPES((tensor).scalar_type(), name, __VA_ARGS__)

template <class T>
const T* pointer_or_null(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

}  // namespace flatcore
