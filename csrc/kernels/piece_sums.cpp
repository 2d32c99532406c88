#include "piece_sums.h"

namespace flatcore {

// A few thousand additions: no work for a second thread.
template <class T>
void add_pieces(int64_t K, int64_t C, const PieceSums<T>& first, const PieceSums<T>& second) {
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t c = 0; c < C; ++c) first.run(k, C, c);
        for (int64_t c = 0; c < C; ++c) second.run(k, C, c);
    }
}

template void add_pieces(int64_t, int64_t, const PieceSums<float>&, const PieceSums<float>&);
template void add_pieces(int64_t, int64_t, const PieceSums<double>&, const PieceSums<double>&);

}  // namespace flatcore
