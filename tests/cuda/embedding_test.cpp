// embedding.cpp against plain loops over the index, and embedding.cu, emulated, against embedding.cpp: the
// same additions in the same order everywhere, equal bit for bit.
#include "kernels/embedding.h"

#include <algorithm>
#include <numeric>

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

struct Segments {
    std::vector<int64_t> order, starts;

    explicit Segments(const std::vector<int64_t>& index) : order(index.size()) {
        const auto of = [&](int64_t position) { return index[static_cast<size_t>(position)]; };
        std::iota(order.begin(), order.end(), 0);
        std::ranges::stable_sort(order, {}, of);
        for (size_t i = 0; i < order.size(); ++i)
            if (i == 0 || of(order[i]) != of(order[i - 1])) starts.push_back(static_cast<int64_t>(i));
        starts.push_back(static_cast<int64_t>(order.size()));
    }
    operator RowSegments() const {
        return {static_cast<int64_t>(starts.size()) - 1, order.data(), starts.data()};
    }
};

// The matrix begins `late` elements after an address that is a multiple of 16, and `gap` more than its size
// lie between directions.
struct Case {
    int64_t K, n, width, vocabulary, frozen = -1, late = 0, gap = 0;
};

template <class T>
void test_rows(const Case& a) {
    const auto [K, n, width, vocabulary, frozen, late, gap] = a;
    const int64_t stride = vocabulary * width + gap;
    const auto index = indices(n, vocabulary, 1);
    const auto x = numbers<T>(K * stride + late, 2), rows = numbers<T>(K * n * width, 3);

    auto plain = numbers<T>(K * n * width, 4), gathered = plain, on_device = plain, plain_sums = x, sums = x,
         device_sums = x;
    for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < width; ++j) {
                const int64_t chosen = index[static_cast<size_t>(i)];
                const auto row = static_cast<size_t>((k * n + i) * width + j),
                           entry = static_cast<size_t>(late + k * stride + chosen * width + j);
                plain[row] = chosen == frozen ? T(0) : x[entry];
                if (chosen != frozen) plain_sums[entry] += rows[row];
            }
    gather_rows(K, n, width, index.data(), frozen, x.data() + late, stride, gathered.data());
    cuda::gather_rows(K, n, width, index.data(), frozen, x.data() + late, stride, on_device.data(), nullptr);
    EXPECT(equal(gathered, plain) && equal(on_device, plain));

    const Segments segments(index);
    scatter_rows(K, n, width, index.data(), segments, frozen, rows.data(), sums.data() + late, stride);
    cuda::scatter_rows(K, n, width, index.data(), segments, frozen, rows.data(), device_sums.data() + late,
                       stride, nullptr);
    EXPECT(equal(sums, plain_sums) && equal(device_sums, plain_sums));
}

template <class T>
void test_all() {
    for (const Case& a :
         {Case{0, 3, 4, 5}, Case{2, 0, 4, 5}, Case{2, 3, 0, 5}, Case{1, 1, 1, 1}, Case{3, 20, 7, 5},
          Case{2, 20, 8, 5, 3}, Case{2, 40, 132, 3, 0, 0, 4}, Case{2, 20, 8, 5, 3, 1},
          Case{2, 20, 8, 5, 3, 0, 1}, Case{1, 3, 1100, 5}, Case{2, 9, 4, 1, 0}})
        test_rows<T>(a);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: rows, columns and directions are reached by striding.
    test_rows<float>({1, 2600, 129, 1900, 5});
    test_rows<float>({1030, 3, 5, 4, 2});
    test_rows<float>({1, 2, 1024 * 256 + 1, 2});
    return failures != 0;
}
