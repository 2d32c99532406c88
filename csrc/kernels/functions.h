// The scalar functions of the `unary` op: value, first and second derivative side by side, for the CPU and
// CUDA. Each functor takes z and writes y = f(z), d1 = f'(z), d2 = f''(z). `curved` is false where f'' is
// zero wherever it exists; the caller then neither stores nor reads d2. At a kink the derivative is the one
// torch's autograd takes.
#pragma once

#include <stdexcept>
#include <string>

#include "macros.h"
#include "vector_math.h"

namespace flatcore {

struct Constants {
    double a = 0, b = 0, c = 0;
};

namespace functions {

#define FLATCORE_FUNCTION(Name, is_curved)                                   \
    struct Name {                                                            \
        static constexpr bool curved = is_curved;                            \
        Constants p;                                                         \
        template <class T>                                                   \
        FLATCORE_HOST_DEVICE void operator()(T z, T& y, T& d1, T& d2) const; \
    };                                                                       \
    template <class T>                                                       \
    FLATCORE_HOST_DEVICE void Name::operator()([[maybe_unused]] T z, T& y, T& d1, T& d2) const

template <class T>
FLATCORE_HOST_DEVICE T logistic(T z) {
    return T(1) / (T(1) + std::exp(-z));
}

FLATCORE_FUNCTION(Relu, false) {
    y = z > T(0) ? z : T(0);
    d1 = z > T(0) ? T(1) : T(0);
    d2 = T(0);
}

FLATCORE_FUNCTION(LeakyRelu, false) {  // a: slope for z <= 0
    d1 = z > T(0) ? T(1) : T(p.a);
    y = z * d1;
    d2 = T(0);
}

FLATCORE_FUNCTION(Elu,
                  true) {  // a: alpha, b: scale, c: input scale; b z above zero, a b (exp(c z) - 1) below
    const T below = T(p.a) * T(p.b), rate = T(p.c);
    // exp of the clamped argument: the branch not taken must not overflow.
    const T e = std::exp(z < T(0) ? z * rate : T(0));
    y = z > T(0) ? T(p.b) * z : below * std::expm1(z < T(0) ? z * rate : T(0));
    d1 = z > T(0) ? T(p.b) : below * rate * e;
    d2 = z > T(0) ? T(0) : below * rate * rate * e;
}

FLATCORE_FUNCTION(Gelu, true) {  // z Phi(z), Phi the normal distribution function; phi its density
    const T cdf = T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440)));
    const T density = T(0.39894228040143267794) * std::exp(T(-0.5) * z * z);
    y = z * cdf;
    d1 = cdf + z * density;
    d2 = density * (T(2) - z * z);
}

FLATCORE_FUNCTION(GeluTanh, true) {  // z (1 + tanh u) / 2, u = k (z + q z^3), k = sqrt(2/pi)
    const T k = T(0.79788456080286535588), q = T(0.044715);
    const T u = k * z * (T(1) + q * z * z);
    // tanh u and its derivative s through e = exp(-2|u|): s as 1 - t^2 would lose all its digits where t
    // nears 1.
    const T e = std::exp(T(-2) * (u < T(0) ? -u : u)), r = T(1) / (T(1) + e);
    const T magnitude = (T(1) - e) * r, t = u < T(0) ? -magnitude : magnitude;
    const T s = T(4) * e * r * r;
    const T du = k * (T(1) + T(3) * q * z * z), ddu = T(6) * k * q * z;
    y = T(0.5) * z * (T(1) + t);
    d1 = T(0.5) * (T(1) + t) + T(0.5) * z * s * du;
    d2 = s * (du + T(0.5) * z * ddu - z * t * du * du);
}

FLATCORE_FUNCTION(Silu, true) {
    const T s = logistic(z);
    y = z * s;
    d1 = s * (T(1) + z * (T(1) - s));
    d2 = s * (T(1) - s) * (T(2) + z * (T(1) - T(2) * s));
}

FLATCORE_FUNCTION(Tanh, true) {
    y = std::tanh(z);
    d1 = T(1) - y * y;
    d2 = T(-2) * y * d1;
}

FLATCORE_FUNCTION(Sigmoid, true) {
    y = logistic(z);
    d1 = y * (T(1) - y);
    d2 = d1 * (T(1) - T(2) * y);
}

FLATCORE_FUNCTION(Softplus, true) {  // log(1 + exp(a z)) / a; linear where a z > b
    const T u = T(p.a) * z, s = logistic(u);
    const bool linear = u > T(p.b);
    const T magnitude = u > T(0) ? u : -u;
    const T smooth = (u > T(0) ? u : T(0)) + std::log1p(std::exp(-magnitude));
    y = linear ? z : smooth / T(p.a);
    d1 = linear ? T(1) : s;
    d2 = linear ? T(0) : T(p.a) * s * (T(1) - s);
}

FLATCORE_FUNCTION(Square, true) {
    y = z * z;
    d1 = T(2) * z;
    d2 = T(2);
}

FLATCORE_FUNCTION(Abs, false) {
    y = z < T(0) ? -z : z;
    d1 = z > T(0) ? T(1) : (z < T(0) ? T(-1) : T(0));
    d2 = T(0);
}

FLATCORE_FUNCTION(SmoothL1, true) {  // a: beta; z^2 / (2 a) where |z| < a, |z| - a / 2 beyond
    const T beta = T(p.a), magnitude = z < T(0) ? -z : z;
    const bool inside = magnitude < beta;
    const T sign = z > T(0) ? T(1) : (z < T(0) ? T(-1) : T(0));
    y = inside ? T(0.5) * z * z / beta : magnitude - T(0.5) * beta;
    d1 = inside ? z / beta : sign;
    d2 = inside ? T(1) / beta : T(0);
}

FLATCORE_FUNCTION(Huber, true) {  // a: delta; z^2 / 2 where |z| <= a, a (|z| - a / 2) beyond
    const T delta = T(p.a), magnitude = z < T(0) ? -z : z;
    const bool inside = magnitude <= delta;
    y = inside ? T(0.5) * z * z : delta * (magnitude - T(0.5) * delta);
    d1 = inside ? z : (z > T(0) ? delta : -delta);
    d2 = inside ? T(1) : T(0);
}

FLATCORE_FUNCTION(Exp, true) { y = d1 = d2 = std::exp(z); }

FLATCORE_FUNCTION(Log, true) {
    y = std::log(z);
    d1 = T(1) / z;
    d2 = -d1 * d1;
}

FLATCORE_FUNCTION(Sqrt, true) {
    y = std::sqrt(z);
    d1 = T(0.5) / y;
    d2 = T(-0.5) * d1 / z;
}

FLATCORE_FUNCTION(Rsqrt, true) {
    y = T(1) / std::sqrt(z);
    d1 = T(-0.5) * y / z;
    d2 = T(-1.5) * d1 / z;
}

FLATCORE_FUNCTION(Reciprocal, true) {
    y = T(1) / z;
    d1 = -y * y;
    d2 = T(-2) * y * d1;
}

FLATCORE_FUNCTION(Pow, true) {  // a: exponent; the factors vanish before a power of zero could be infinite
    const T e = T(p.a);
    y = std::pow(z, e);
    d1 = e == T(0) ? T(0) : e * std::pow(z, e - T(1));
    d2 = e == T(0) || e == T(1) ? T(0) : e * (e - T(1)) * std::pow(z, e - T(2));
}

FLATCORE_FUNCTION(Sin, true) {
    y = std::sin(z);
    d1 = std::cos(z);
    d2 = -y;
}

FLATCORE_FUNCTION(Cos, true) {
    y = std::cos(z);
    d1 = -std::sin(z);
    d2 = -y;
}

FLATCORE_FUNCTION(Clamp, false) {  // a: least, b: most; torch counts both ends to the inside
    const T least = T(p.a), most = T(p.b);
    y = z < least ? least : (z > most ? most : z);
    d1 = z < least || z > most ? T(0) : T(1);
    d2 = T(0);
}

FLATCORE_FUNCTION(Hardtanh, false) {  // the same, but both ends count to the outside, as in relu
    const T least = T(p.a), most = T(p.b);
    y = z < least ? least : (z > most ? most : z);
    d1 = z <= least || z >= most ? T(0) : T(1);
    d2 = T(0);
}

FLATCORE_FUNCTION(Hardsigmoid, false) {  // (z + 3) / 6 between -3 and 3
    const bool inside = z > T(-3) && z < T(3);
    y = inside ? (z + T(3)) / T(6) : (z > T(0) ? T(1) : T(0));
    d1 = inside ? T(1) / T(6) : T(0);
    d2 = T(0);
}

FLATCORE_FUNCTION(Hardswish, true) {  // z (z + 3) / 6 between -3 and 3
    const bool inside = z > T(-3) && z < T(3);
    const T outside = z > T(0) ? T(1) : T(0);
    y = inside ? z * (z + T(3)) / T(6) : z * outside;
    d1 = inside ? z / T(3) + T(0.5) : outside;
    d2 = inside ? T(1) / T(3) : T(0);
}

FLATCORE_FUNCTION(Mish, true) {  // z t, t = tanh(log(1 + exp z)) = (1 + 2 v) / D with D = 1 + 2 v + 2 v^2
    // In v = exp(-|z|), for either sign of z, so that nothing overflows and no digits of t' are lost.
    const bool positive = z > T(0);
    const T v = std::exp(positive ? -z : z), s = (positive ? T(1) : v) / (T(1) + v);
    const T inverse = T(1) / (positive ? T(1) + T(2) * v + T(2) * v * v : v * v + T(2) * v + T(2));
    const T t = (positive ? T(1) + T(2) * v : v * (v + T(2))) * inverse;
    const T dt = T(4) * v * (T(1) + v) * (positive ? v : T(1)) * inverse * inverse;
    y = z * t;
    d1 = t + z * dt;
    d2 = dt * (T(2) + z * (T(1) - s - T(2) * t * s));
}

FLATCORE_FUNCTION(Erf, true) {
    y = std::erf(z);
    d1 = T(1.12837916709551257390) * std::exp(-z * z);
    d2 = T(-2) * z * d1;
}

FLATCORE_FUNCTION(Log1p, true) {
    y = std::log1p(z);
    d1 = T(1) / (T(1) + z);
    d2 = -d1 * d1;
}

FLATCORE_FUNCTION(Expm1, true) {
    y = std::expm1(z);
    d1 = d2 = std::exp(z);
}

FLATCORE_FUNCTION(Step, false) {  // what a comparison of z with zero gives
    y = z > T(0) ? T(1) : T(0);
    d1 = d2 = T(0);
}

#undef FLATCORE_FUNCTION

}  // namespace functions

// The one list of names. X(name used in programs, functor)
#define FLATCORE_FUNCTIONS(X)     \
    X("relu", Relu)               \
    X("leaky_relu", LeakyRelu)    \
    X("elu", Elu)                 \
    X("gelu", Gelu)               \
    X("gelu_tanh", GeluTanh)      \
    X("silu", Silu)               \
    X("tanh", Tanh)               \
    X("sigmoid", Sigmoid)         \
    X("softplus", Softplus)       \
    X("square", Square)           \
    X("abs", Abs)                 \
    X("smooth_l1", SmoothL1)      \
    X("huber", Huber)             \
    X("exp", Exp)                 \
    X("log", Log)                 \
    X("sqrt", Sqrt)               \
    X("rsqrt", Rsqrt)             \
    X("reciprocal", Reciprocal)   \
    X("pow", Pow)                 \
    X("sin", Sin)                 \
    X("cos", Cos)                 \
    X("clamp", Clamp)             \
    X("hardtanh", Hardtanh)       \
    X("hardsigmoid", Hardsigmoid) \
    X("hardswish", Hardswish)     \
    X("mish", Mish)               \
    X("erf", Erf)                 \
    X("log1p", Log1p)             \
    X("expm1", Expm1)             \
    X("step", Step)

enum class Function {
#define X(name, Functor) Functor,
    FLATCORE_FUNCTIONS(X)
#undef X
};

inline Function function_named(const std::string& name) {
#define X(text, Functor) \
    if (name == text) return Function::Functor;
    FLATCORE_FUNCTIONS(X)
#undef X
    throw std::invalid_argument("unary: unknown function '" + name + "'");
}

// Calls visitor(functor) with the functor of `function`.
template <class Visitor>
auto visit_function(Function function, const Constants& constants, const Visitor& visitor) {
    switch (function) {
#define X(name, Functor)    \
    case Function::Functor: \
        return visitor(functions::Functor{constants});
        FLATCORE_FUNCTIONS(X)
#undef X
    }
    throw std::invalid_argument("unary: unknown function");
}

}  // namespace flatcore
