// What the bindings of the Krylov methods share: a space whose products are a Python callable (p, P) -> (p,
// P).
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "tensor_space.h"

namespace flatcore {

// The GIL is held for the product alone; the recurrences run without it. The space itself, which owns the
// callable, is made and destroyed with the GIL held.
inline TensorSpace make_space(pybind11::function product, int64_t P, const at::TensorOptions& options,
                              uint64_t seed, MappedRows mapped = {}) {
    auto apply = [product = std::move(product)](const at::Tensor& X) {
        pybind11::gil_scoped_acquire acquire;
        return product(X).cast<at::Tensor>();
    };
    return TensorSpace(std::move(apply), P, options, seed, std::move(mapped));
}

inline void check_rows(const char* name, const at::Tensor& X) {
    if (X.dim() != 2 || !X.is_contiguous() ||
        (X.scalar_type() != at::kFloat && X.scalar_type() != at::kDouble))
        throw pybind11::value_error(std::string(name) +
                                    ": expected contiguous float32 or float64 rows (p, P)");
}

}  // namespace flatcore
