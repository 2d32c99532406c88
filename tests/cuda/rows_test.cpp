// What cuda_rows.h adds to the grids: teams, their sums, and the order of the rows of K directions.
#include "rows.h"

#include <numeric>

#include "expect.h"
#include "kernels/cuda_rows.h"

using namespace flatcore::cuda;

namespace {

// A long row takes the block's two barriers several times; sums and peaks of one pass must not mix with those
// of the next.
template <class Team>
__global__ void sums_and_peaks(int64_t C, const double* x, double* out) {
    for (int64_t row = Team::row(); row < 2 * Team::rows; row += Team::rows) {
        double sums[1] = {0}, others[1] = {0}, peak[1] = {kLowest<double>};
        for_packs<1, Team>(C, [&](int64_t c) {
            sums[0] += x[row * C + c];
            others[0] -= x[row * C + c];
            peak[0] = Max::of(peak[0], x[row * C + c]);
        });
        add_up<Team>(sums);
        add_up<Team>(others);
        Team::template reduce<Max>(peak);
        out[(row * Team::size + Team::rank()) * 3] = sums[0];
        out[(row * Team::size + Team::rank()) * 3 + 1] = others[0];
        out[(row * Team::size + Team::rank()) * 3 + 2] = peak[0];
    }
}

template <class Team>
void test_team(int64_t C) {
    const int64_t rows = 2 * Team::rows;
    std::vector<double> x(static_cast<size_t>(rows * C)), out(static_cast<size_t>(rows * Team::size * 3));
    std::iota(x.begin(), x.end(), -100.0);
    launch(sums_and_peaks<Team>, 1, Team::threads, nullptr, C, x.data(), out.data());
    for (int64_t i = 0; i < rows * Team::size; ++i) {
        const auto first = x.begin() + i / Team::size * C;
        const double sum = std::accumulate(first, first + C, 0.0);
        const double* got = &out[static_cast<size_t>(i * 3)];
        EXPECT(got[0] == sum && got[1] == -sum && got[2] == *(first + C - 1));
    }
}

// Every row of every direction once; the same row in successive directions; also beyond 32 bits.
void test_direction_row() {
    for (const int64_t K : {int64_t{1}, int64_t{7}, (int64_t{1} << 33) + 1}) {
        const int64_t rows = (int64_t{1} << 29) + 3;
        for (const int64_t row : {int64_t{0}, int64_t{1}, rows - 1})
            for (const int64_t k : {int64_t{0}, K / 2, K - 1}) {
                const DirectionRow i = direction_row(row * K + k, K, rows);
                EXPECT(i.k == k && i.row == row && i.at == k * rows + row);
            }
    }
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        thread_order = order;
        for (const int64_t C : {1, 32, 1000}) {
            test_team<Warp>(C);
            test_team<Block>(C);
        }
    }
    test_direction_row();
    return failures != 0;
}
