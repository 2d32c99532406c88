#include "gather.h"

#include <algorithm>

#include "parallel.h"

namespace flatcore {

namespace {

constexpr int64_t kGrain = 8192;  // elements per thread below which a second thread costs more than it saves

int64_t image_grain(int64_t elements) {
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1));
}

}  // namespace

template <class T>
void gather_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result) {
    const auto [images, in, out, channels] = shape;
    const int64_t in_size = in * channels, out_size = out * channels, C = channels, n = images;
    parallel_for(0, K * n, image_grain(out_size), [=](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; ++image) {
            const int64_t* choice = index + (image % n) * out_size;
            const T* source = t + image * in_size;
            T* target = result + image * out_size;
            for (int64_t i = 0; i < out_size; i += C)
                for (int64_t c = 0; c < C; ++c) target[i + c] = source[choice[i + c] * C + c];
        }
    });
}

template <class T>
void scatter_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result) {
    const auto [images, in, out, channels] = shape;
    const int64_t in_size = in * channels, out_size = out * channels, C = channels, n = images;
    parallel_for(0, K * n, image_grain(in_size), [=](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; ++image) {
            const int64_t* choice = index + (image % n) * out_size;
            const T* source = t + image * out_size;
            T* target = result + image * in_size;
            std::fill(target, target + in_size, T(0));
            for (int64_t i = 0; i < out_size; i += C)
                for (int64_t c = 0; c < C; ++c) target[choice[i + c] * C + c] += source[i + c];
        }
    });
}

#define INSTANTIATE(T)                                                                     \
    template void gather_pixels(int64_t, const PixelShape&, const int64_t*, const T*, T*); \
    template void scatter_pixels(int64_t, const PixelShape&, const int64_t*, const T*, T*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
