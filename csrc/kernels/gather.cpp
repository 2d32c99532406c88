#include "gather.h"

#include <algorithm>

#include "parallel.h"

namespace flatcore {

namespace {
constexpr int64_t kGrain = 8192;  // elements per thread below which a second thread costs more than it saves
}

template <class T>
void gather_planes(int64_t K, int64_t planes, int64_t in, int64_t out, const int64_t* index, const T* t, T* result) {
    parallel_for(0, K * planes, std::max<int64_t>(1, kGrain / std::max<int64_t>(out, 1)), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t* choice = index + (row % planes) * out;
            const T* source = t + row * in;
            T* target = result + row * out;
            for (int64_t o = 0; o < out; ++o) target[o] = source[choice[o]];
        }
    });
}

template <class T>
void scatter_planes(int64_t K, int64_t planes, int64_t in, int64_t out, const int64_t* index, const T* t, T* result) {
    parallel_for(0, K * planes, std::max<int64_t>(1, kGrain / std::max<int64_t>(in, 1)), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t* choice = index + (row % planes) * out;
            const T* source = t + row * out;
            T* target = result + row * in;
            std::fill(target, target + in, T(0));
            for (int64_t o = 0; o < out; ++o) target[choice[o]] += source[o];
        }
    });
}

#define INSTANTIATE(T)                                                                                      \
    template void gather_planes(int64_t, int64_t, int64_t, int64_t, const int64_t*, const T*, T*);          \
    template void scatter_planes(int64_t, int64_t, int64_t, int64_t, const int64_t*, const T*, T*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
