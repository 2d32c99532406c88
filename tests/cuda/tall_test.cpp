// tall.cu, emulated, against plain double loops over arrays whose rows lie apart: what is between them is NaN
// and must be neither read nor written. The bounds are those of a sum of n products: (n + 1) eps sum |x y|,
// with n the columns of a run for tall_gram, whose further sums are in double, and m for the others.
#include "kernels/tall.h"

#include <limits>

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

template <class T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();

template <class T>
struct Rows {
    int64_t rows, P, stride;
    std::vector<T> data;

    Rows(int64_t rows, int64_t P, int64_t gap, unsigned seed) : rows(rows), P(P), stride(P + gap) {
        // The last row ends with its own last entry.
        data.assign(static_cast<size_t>(rows > 0 ? (rows - 1) * stride + P : 0),
                    std::numeric_limits<T>::quiet_NaN());
        const std::vector<T> values = numbers<T>(rows * P, seed);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < P; ++c) at(i, c) = values[static_cast<size_t>(i * P + c)];
    }
    T& at(int64_t i, int64_t c) { return data[static_cast<size_t>(i * stride + c)]; }
    T at(int64_t i, int64_t c) const { return data[static_cast<size_t>(i * stride + c)]; }
    bool gaps_untouched() const {
        for (int64_t i = 0; i + 1 < rows; ++i)
            for (int64_t c = P; c < stride; ++c)
                if (!std::isnan(at(i, c))) return false;
        return true;
    }
};

template <class T>
void test_gram(int64_t p, int64_t m, int64_t P, int64_t gap) {
    const Rows<T> X(p, P, gap, 1), Y(m, P, gap, 2);
    std::vector<double> workspace(static_cast<size_t>(tall_gram_workspace(p, m, P)), 1e300);
    std::vector<double> out(static_cast<size_t>(p * m), 1e300), again = out, plain = out;
    cuda::tall_gram(p, m, P, X.data.data(), X.stride, Y.data.data(), Y.stride, workspace.data(), out.data(),
                    nullptr);
    cuda::tall_gram(p, m, P, X.data.data(), X.stride, Y.data.data(), Y.stride, workspace.data(), again.data(),
                    nullptr);
    EXPECT(equal(out, again));
    tall_gram(p, m, P, X.data.data(), X.stride, Y.data.data(), Y.stride, workspace.data(), plain.data());
    for (int64_t i = 0; i < p; ++i)
        for (int64_t j = 0; j < m; ++j) {
            double exact = 0.0, size = 0.0;
            for (int64_t c = 0; c < P; ++c) {
                exact += double{X.at(i, c)} * double{Y.at(j, c)};
                size += std::abs(double{X.at(i, c)} * double{Y.at(j, c)});
            }
            const double in_double = static_cast<double>(P + 1) * kEpsilon<double> * size;
            const auto entry = static_cast<size_t>(i * m + j);
            EXPECT(std::abs(out[entry] - exact) <= 17 * kEpsilon<T> * size + in_double);
            EXPECT(std::abs(plain[entry] - exact) <= in_double);
        }
}

template <class T>
void test_combine(int64_t p, int64_t m, int64_t P, int64_t gap) {
    const std::vector<T> B = numbers<T>(p * m, 3);
    const Rows<T> Y(m, P, gap, 1), before(p, P, gap, 2);
    for (const bool update : {true, false}) {
        Rows<T> X = before, plain = before;
        if (!update)  // what was there must not matter
            for (int64_t i = 0; i < p; ++i)
                for (int64_t c = 0; c < P; ++c) X.at(i, c) = std::numeric_limits<T>::quiet_NaN();
        if (update) {
            cuda::tall_update(p, m, P, B.data(), Y.data.data(), Y.stride, X.data.data(), X.stride, nullptr);
            tall_update(p, m, P, B.data(), Y.data.data(), Y.stride, plain.data.data(), plain.stride);
        } else {
            cuda::tall_combine(p, m, P, B.data(), Y.data.data(), Y.stride, X.data.data(), X.stride, nullptr);
            tall_combine(p, m, P, B.data(), Y.data.data(), Y.stride, plain.data.data(), plain.stride);
        }
        bool right = X.gaps_untouched();
        for (int64_t i = 0; i < p; ++i)
            for (int64_t c = 0; c < P; ++c) {
                double sum = 0.0, size = update ? std::abs(double{before.at(i, c)}) : 0.0;
                for (int64_t j = 0; j < m; ++j) {
                    const double term = double{B[static_cast<size_t>(i * m + j)]} * double{Y.at(j, c)};
                    sum += term;
                    size += std::abs(term);
                }
                const double exact = update ? double{before.at(i, c)} - sum : sum;
                const double allowed = static_cast<double>(m + 2) * kEpsilon<T> * size;
                right = right && std::abs(double{X.at(i, c)} - exact) <= allowed &&
                        std::abs(double{plain.at(i, c)} - exact) <= allowed;
            }
        EXPECT(right);
    }
}

template <class T>
void test_all() {
    // All sizes of tiles and their ends; with packs (P and gap multiples of 4) and without.
    for (const auto& [P, gap] : {std::pair<int64_t, int64_t>{40, 8}, {37, 3}})
        for (const int64_t p : {0, 1, 2, 3, 5, 9})
            for (const int64_t m : {0, 1, 5, 8, 17}) {
                test_gram<T>(p, m, P, gap);
                test_combine<T>(p, m, P, gap);
            }
    for (const auto& [p, m] : {std::pair<int64_t, int64_t>{1, 70}, {8, 70}, {70, 3}}) {
        test_gram<T>(p, m, 38, 0);
        test_combine<T>(p, m, 38, 0);
    }
    for (const int64_t P : {0, 1, 3, 4, 4099, 12292}) {
        test_gram<T>(2, 9, P, 0);
        test_combine<T>(3, 5, P, 0);
    }
    test_combine<T>(2, 300, 41, 0);  // more factors than shared memory holds at once
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    test_gram<float>(70, 70, 38, 0);
    test_gram<float>(1, 1, int64_t{1024} * 256 * 17 + 5,
                     0);  // columns by striding: more than one run a thread
    test_combine<float>(1, 1, int64_t{1024} * 256 + 5, 0);
    return failures != 0;
}
