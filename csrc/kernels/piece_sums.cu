#include "piece_sums.h"

#include "cuda_grid.h"

namespace flatcore::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_pieces_kernel(int64_t K, int64_t C, PieceSums<T> first, PieceSums<T> second) {
    for (int64_t c = first_element(); c < C; c += element_stride())
        for (int64_t k = blockIdx.y; k < K; k += gridDim.y) {
            first.run(k, C, c);
            second.run(k, C, c);
        }
}

}  // namespace

template <class T>
void add_pieces(int64_t K, int64_t C, const PieceSums<T>& first, const PieceSums<T>& second, void* stream) {
    if (K == 0 || C == 0) return;  // an empty grid is an error
    launch(add_pieces_kernel<T>, elements_grid(C, K), dim3(kThreads), stream, K, C, first, second);
}

template void add_pieces(int64_t, int64_t, const PieceSums<float>&, const PieceSums<float>&, void*);
template void add_pieces(int64_t, int64_t, const PieceSums<double>&, const PieceSums<double>&, void*);

}  // namespace flatcore::cuda
