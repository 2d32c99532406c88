// The space of a method whose operator is a Python callable (p, P) -> (p, P).
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

#include "estimator_space.h"

namespace flatcore {

// The GIL is held for the product alone.
inline EstimatorSpace python_space(pybind11::function product, const at::Tensor& like, int64_t P,
                                   uint64_t seed) {
    auto held = std::make_shared<pybind11::function>(std::move(product));
    auto apply = [held](const at::Tensor& X) {
        pybind11::gil_scoped_acquire acquire;
        return (*held)(X).cast<at::Tensor>();
    };
    return EstimatorSpace(std::move(apply), like, P, seed);
}

}  // namespace flatcore
