// Attention through the sweeps by its definition, dense and in double, for one head and one direction; and
// bounds of what rounding can do to the fused kernels, by running error analysis: every number carries a
// bound of its error, and each operation adds to it what it passes on and what it rounds itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace reference {

struct Matrix {
    int64_t rows = 0, columns = 0;
    std::vector<double> data;  // empty: absent

    Matrix() = default;
    Matrix(int64_t rows_, int64_t columns_)
        : rows(rows_), columns(columns_), data(static_cast<size_t>(rows_ * columns_)) {}
    bool present() const { return rows * columns == 0 || !data.empty(); }
    double& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * columns + j)]; }
    double operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * columns + j)]; }
};

// Of one head. bias is 0, the mask, or -infinity.
struct Inputs {
    Matrix q, k, v, bias;
    double scale = 1;
};
// Absent: zero. Without dout no second-derivative terms.
struct Directions {
    Matrix dout, tq, tk, tv, tdo;
};
struct Results {
    Matrix o, to, tdq, tdk, tdv;
};

inline double entry(const Matrix& m, int64_t i, int64_t j) { return m.data.empty() ? 0 : m(i, j); }

// engine/rules/attention.cpp, line by line.
inline Results attention(const Inputs& in, const Directions& d) {
    const int64_t n = in.q.rows, m = in.k.rows, width = in.q.columns, value_width = in.v.columns;
    const bool second_order = !d.dout.data.empty();
    Results r{Matrix(n, value_width), Matrix(n, value_width), Matrix(n, width), Matrix(m, width),
              Matrix(m, value_width)};
    for (int64_t i = 0; i < n; ++i) {
        const auto row = [&] { return std::vector<double>(static_cast<size_t>(m)); };
        std::vector<double> p = row(), tz = row(), dp = row(), tdp = row();
        double most = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int64_t j = 0; j < m; ++j) {
            const auto at = static_cast<size_t>(j);
            for (int64_t c = 0; c < width; ++c) {
                p[at] += in.scale * in.q(i, c) * in.k(j, c);
                tz[at] += in.scale * (entry(d.tq, i, c) * in.k(j, c) + in.q(i, c) * entry(d.tk, j, c));
            }
            for (int64_t c = 0; c < value_width; ++c) {
                dp[at] += entry(d.dout, i, c) * in.v(j, c);
                tdp[at] += entry(d.tdo, i, c) * in.v(j, c) + entry(d.dout, i, c) * entry(d.tv, j, c);
            }
            p[at] += in.bias(i, j);
            most = std::max(most, p[at]);
        }
        if (std::isinf(most)) continue;  // sees no key
        for (double& x : p) sum += x = std::exp(x - most);
        double p_tz = 0, p_dp = 0;
        for (size_t j = 0; j < p.size(); ++j) {
            p[j] /= sum;
            p_tz += p[j] * tz[j];
            p_dp += p[j] * dp[j];
        }
        // Without second-derivative terms p does not move in the adjoint sweep.
        double p_tdp = 0, tp_dp = 0;
        for (size_t j = 0; j < p.size(); ++j) {
            p_tdp += p[j] * tdp[j];
            tp_dp += p[j] * (tz[j] - p_tz) * dp[j];
        }
        for (int64_t j = 0; j < m; ++j) {
            const auto at = static_cast<size_t>(j);
            const double tp = p[at] * (tz[at] - p_tz), dz = p[at] * (dp[at] - p_dp);
            double tdz = p[at] * (tdp[at] - p_tdp);
            if (second_order) tdz += tp * (dp[at] - p_dp) - p[at] * tp_dp;
            for (int64_t c = 0; c < value_width; ++c) {
                r.o(i, c) += p[at] * in.v(j, c);
                r.to(i, c) += tp * in.v(j, c) + p[at] * entry(d.tv, j, c);
                r.tdv(j, c) += p[at] * entry(d.tdo, i, c) + tp * entry(d.dout, i, c);
            }
            for (int64_t c = 0; c < width; ++c) {
                r.tdq(i, c) += in.scale * (tdz * in.k(j, c) + dz * entry(d.tk, j, c));
                r.tdk(j, c) += in.scale * (tdz * in.q(i, c) + dz * entry(d.tq, i, c));
            }
        }
    }
    return r;
}

// A number and a bound of its error.
struct Bounded {
    double value = 0, error = 0;
    double size() const { return std::abs(value) + error; }
};

// Of the kernels, operation by operation, with unit roundoff `unit` of sums and `operand` of what matrix
// products read.
class Bounds {
 public:
    Bounds(double unit, double operand) : unit_(unit), operand_(operand) {}

    Results attention(const Inputs& in, const Directions& d) const;

 private:
    using Row = std::vector<Bounded>;

    // A sum of products in any order: (terms) roundings at most of each partial sum.
    struct Sum {
        const Bounds& bounds;
        double value = 0, passed = 0, sizes = 0;
        int64_t terms = 0;
        void add(Bounded a, Bounded b, bool rounded) {
            if (rounded) a = bounds.rounded(a), b = bounds.rounded(b);
            value += a.value * b.value;
            passed += std::abs(a.value) * b.error + a.error * b.size();
            sizes += a.size() * b.size();
            ++terms;
        }
        Bounded result() const {
            return {value, passed + static_cast<double>(terms + 1) * bounds.unit_ * 1.01 * sizes};
        }
    };
    Sum sum() const { return {*this}; }
    Bounded rounded(Bounded a) const { return {a.value, a.error + operand_ * a.size()}; }
    Bounded done(double value, double passed) const {
        return {value, passed + unit_ * (std::abs(value) + passed)};
    }
    Bounded plus(Bounded a, Bounded b) const { return done(a.value + b.value, a.error + b.error); }
    Bounded minus(Bounded a, Bounded b) const { return plus(a, {-b.value, b.error}); }
    Bounded times(Bounded a, Bounded b) const {
        return done(a.value * b.value, std::abs(a.value) * b.error + a.error * b.size());
    }
    // exp(z_j - peak) / sum of them, the logits of numerator and sum computed apart. Libraries' exponentials
    // are good to 2 units in the last place, 4 unit roundoffs; a term of the sum goes through one factor for
    // each further term at most, with exponents that add up to its distance from the peak.
    Row probabilities(const Row& z) const {
        double peak = -std::numeric_limits<double>::infinity(), sum = 0, error = 0, spread = 0;
        for (const Bounded& x : z) peak = std::max(peak, x.value);
        Row p(z.size());
        if (std::isinf(peak)) return p;
        for (const Bounded& x : z)
            if (!std::isinf(x.value)) {
                sum += std::exp(x.value - peak);
                error = std::max(error, x.error);
                spread = std::max(spread, peak - x.value + 2 * x.error);
            }
        const double of_sum = error + unit_ * (6 * static_cast<double>(z.size()) + 2 * spread);
        for (size_t j = 0; j < z.size(); ++j)
            if (!std::isinf(z[j].value)) {
                const double value = std::exp(z[j].value - peak) / sum;
                p[j] = {value, value * std::expm1(z[j].error + of_sum + unit_ * (spread + 12))};
            }
        return p;
    }

    double unit_, operand_;
};

inline Bounded exact(const Matrix& m, int64_t i, int64_t j) { return {entry(m, i, j), 0}; }

inline Results Bounds::attention(const Inputs& in, const Directions& d) const {
    const int64_t n = in.q.rows, m = in.k.rows, width = in.q.columns, value_width = in.v.columns;
    const bool second_order = !d.dout.data.empty();
    const Bounded scale{in.scale, unit_ * in.scale};
    Results r{Matrix(n, value_width), Matrix(n, value_width), Matrix(n, width), Matrix(m, width),
              Matrix(m, value_width)};
    std::vector<Row> all_p, all_tp, all_dz, all_tdz;
    for (int64_t i = 0; i < n; ++i) {
        const auto row = [&] { return Row(static_cast<size_t>(m)); };
        Row z = row(), p = row(), tz = row(), u = row(), w = row(), tp = row(), dz = row(), tdz = row();
        for (int64_t j = 0; j < m; ++j) {
            const auto at = static_cast<size_t>(j);
            Sum of_z = sum(), of_tz = sum(), of_dp = sum();
            for (int64_t c = 0; c < width; ++c) {
                of_z.add(exact(in.q, i, c), exact(in.k, j, c), true);
                of_tz.add(exact(d.tq, i, c), exact(in.k, j, c), true);
                of_tz.add(exact(in.q, i, c), exact(d.tk, j, c), true);
            }
            for (int64_t c = 0; c < value_width; ++c) of_dp.add(exact(d.dout, i, c), exact(in.v, j, c), true);
            z[at] = std::isinf(in.bias(i, j)) ? Bounded{in.bias(i, j), 0}
                                              : plus(times(scale, of_z.result()), exact(in.bias, i, j));
            tz[at] = times(scale, of_tz.result());
            u[at] = of_dp.result();
        }
        Sum mean_tz = sum(), mean_w = sum(), dout_o = sum();
        p = probabilities(z);
        for (size_t j = 0; j < p.size(); ++j) mean_tz.add(p[j], tz[j], false);
        for (int64_t c = 0; c < value_width; ++c) {
            Sum of_o = sum(), of_to = sum();
            for (int64_t j = 0; j < m; ++j) {
                const auto at = static_cast<size_t>(j);
                of_o.add(p[at], exact(in.v, j, c), true);
                of_to.add(times(p[at], tz[at]), exact(in.v, j, c), true);
                of_to.add(p[at], exact(d.tv, j, c), true);
            }
            const Bounded o = of_o.result(), to = minus(of_to.result(), times(mean_tz.result(), o));
            r.o(i, c) = o.error;
            r.to(i, c) = to.error;
            dout_o.add(exact(d.dout, i, c), o, false);
            mean_w.add(exact(d.tdo, i, c), o, false);
            mean_w.add(exact(d.dout, i, c), to, false);
        }
        for (int64_t j = 0; j < m; ++j) {
            const auto at = static_cast<size_t>(j);
            const Bounded centred = minus(tz[at], mean_tz.result());
            u[at] = minus(u[at], dout_o.result());
            Sum of_w = sum();
            for (int64_t c = 0; c < value_width; ++c) {
                of_w.add(exact(d.tdo, i, c), exact(in.v, j, c), true);
                of_w.add(exact(d.dout, i, c), exact(d.tv, j, c), true);
            }
            if (second_order) {
                of_w.add(centred, u[at], false);
                tp[at] = times(p[at], centred);
                dz[at] = times(p[at], u[at]);
            }
            tdz[at] = times(p[at], minus(of_w.result(), mean_w.result()));
        }
        for (int64_t c = 0; c < width; ++c) {
            Sum of_tdq = sum();
            for (int64_t j = 0; j < m; ++j) {
                const auto at = static_cast<size_t>(j);
                of_tdq.add(tdz[at], exact(in.k, j, c), true);
                of_tdq.add(dz[at], exact(d.tk, j, c), true);
            }
            r.tdq(i, c) = times(scale, of_tdq.result()).error;
        }
        all_p.push_back(p);
        all_tp.push_back(tp);
        all_dz.push_back(dz);
        all_tdz.push_back(tdz);
    }
    for (int64_t j = 0; j < m; ++j) {
        const auto at = static_cast<size_t>(j);
        for (int64_t c = 0; c < width; ++c) {
            Sum of_tdk = sum();
            for (int64_t i = 0; i < n; ++i) {
                of_tdk.add(all_tdz[static_cast<size_t>(i)][at], exact(in.q, i, c), true);
                of_tdk.add(all_dz[static_cast<size_t>(i)][at], exact(d.tq, i, c), true);
            }
            r.tdk(j, c) = times(scale, of_tdk.result()).error;
        }
        for (int64_t c = 0; c < value_width; ++c) {
            Sum of_tdv = sum();
            for (int64_t i = 0; i < n; ++i) {
                of_tdv.add(all_p[static_cast<size_t>(i)][at], exact(d.tdo, i, c), true);
                of_tdv.add(all_tp[static_cast<size_t>(i)][at], exact(d.dout, i, c), true);
            }
            r.tdv(j, c) = of_tdv.result().error;
        }
    }
    return r;
}

}  // namespace reference
