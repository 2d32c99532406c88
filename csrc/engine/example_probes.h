// Probes per example: with L = sum_n l_n over examples that do not interact, E[sum_n v_n^T H_n v_n] = tr H
// for any v_n with E[v_n v_n^T] = I, one of its own for each example n. A parameter then enters the program
// as a constant, and a `probe` op behind each of its uses stands for the change that v_n makes there: no
// product with a matrix of directions, no gradient of a weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>

#include "kernels/example_probes.h"
#include "state.h"

namespace flatcore {

// What the probe ops of one pass are told, and give.
struct ExampleProbes {
    ExampleBlock block;
    // What is added up: <v_n, A_n v_n>, or the squared length of what comes back, the gradient of example n.
    bool squares = false;
    // Probes W A with random signs A, for weights alone: the sum is then sum_ss' <w_s, w_s'> tr H_ss'.
    bool relative = false;
    at::Tensor sums;  // (K, probed parameters, examples) double, added to
    // (P) double or undefined: the diagonal, and where K probes are taken the variance of their mean.
    at::Tensor diagonal, variance;
    std::unordered_map<int, at::Tensor> injected;  // by op
};

// One pass over K = block.probes probes of every example: sums (K, probed, examples) receive what each
// parameter and example adds to the trace of A, mode's operator as in `product`, or Mode::remainder, H - GGN.
void example_pass(const State& state, Mode mode, ExampleProbes& probes);

// The loss' second derivative at the program's one cut value z, along K directions: (K, *z).
at::Tensor cut_curvature(const State& state, const at::Tensor& directions);

// The squared length of J_n^T s_kn for K cotangents (K, *z) of one value z, J_n its derivative for example
// n's part of it: sums (K, probed, examples).
void output_pass(const State& state, ExampleProbes& probes, int value, const at::Tensor& cotangents);

}  // namespace flatcore
