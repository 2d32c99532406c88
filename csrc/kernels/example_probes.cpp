#include "example_probes.h"

#include <algorithm>

#include "dots.inl"
#include "example_probes.inl"
#include "parallel.h"

namespace flatcore {
namespace {

constexpr int64_t kSignsPerPiece = 1 << 14;  // fewer are not worth a thread

// The signs of every byte: looking them up is four times as fast as shifting bits where the processor's
// vectors have no shifts of their own for each lane.
template <class T>
struct ByteSigns {
    T of[256][8];
    ByteSigns() {
        for (int byte = 0; byte < 256; ++byte)
            for (int j = 0; j < 8; ++j) of[byte][j] = body::example_sign<T>(static_cast<uint64_t>(byte >> j));
    }
};

template <class T>
const ByteSigns<T> kSigns;

// The signs of elements [first, first + count), 64 of which share a word.
template <class T>
void run(uint64_t key, int64_t first, int64_t count, T* out) {
    while (count > 0) {
        const int64_t bit = first % 64, length = std::min(count, 64 - bit);
        uint64_t bits = word(key, first / 64) >> bit;
        int64_t j = 0;
        for (; j + 8 <= length; j += 8, bits >>= 8) std::copy_n(kSigns<T>.of[bits & 255], 8, out + j);
        std::copy_n(kSigns<T>.of[bits & 255], length - j, out + j);
        first += length;
        count -= length;
        out += length;
    }
}

// fill(key, example, target) for every probe and example; `count` elements of the result each.
template <class T, class Fill>
void for_each_example(const ExampleBlock& block, int64_t count, T* out, const Fill& fill) {
    const int64_t grain = std::max<int64_t>(1, kSignsPerPiece / std::max<int64_t>(count, 1));
    parallel_for(0, block.probes * block.examples, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t probe = i / block.examples, example = i % block.examples;
            fill(body::example_key(block, probe, example), example, out + i * count);
        }
    });
}

}  // namespace

template <class T>
void example_signs(const ExampleBlock& block, int64_t first, int64_t count, T* out) {
    if (block.probes * block.examples == 1) {  // few and long: the elements are what threads share
        const uint64_t key = body::example_key(block, 0, 0);
        parallel_for(0, count, kSignsPerPiece,
                     [&](int64_t begin, int64_t end) { run(key, first + begin, end - begin, out + begin); });
        return;
    }
    for_each_example(block, count, out,
                     [&](uint64_t key, int64_t, T* target) { run(key, first, count, target); });
}

template <class T>
void example_signs_at(const ExampleBlock& block, int64_t offset, const int64_t* elements, int64_t count,
                      T* out) {
    for_each_example(block, count, out, [&](uint64_t key, int64_t, T* target) {
        for (int64_t j = 0, end; j < count; j = end) {  // stretches of neighbours share words
            for (end = j + 1; end < count && elements[end] == elements[end - 1] + 1;) ++end;
            run(key, offset + elements[j], end - j, target + j);
        }
    });
}

template <class T>
void example_row_signs(const ExampleBlock& block, int64_t offset, const int64_t* index, int64_t rows,
                       int64_t width, int64_t frozen, T* out) {
    for_each_example(block, rows * width, out, [&](uint64_t key, int64_t example, T* target) {
        for (int64_t r = 0; r < rows; ++r, target += width) {
            const int64_t row = index[example * rows + r];
            if (row == frozen)
                std::fill(target, target + width, T(0));
            else
                run(key, offset + row * width, width, target);
        }
    });
}

template <class T>
void row_dots(int64_t rows, int64_t width, const T* a, const T* b, double* out) {
    const int64_t grain = std::max<int64_t>(1, kSignsPerPiece / std::max<int64_t>(width, 1));
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T *x = a + r * width, *y = b + r * width;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; ++j) sum += body::dot_term(x[j], y[j]);
            out[r] = sum;
        }
    });
}

#define FLATCORE_INSTANTIATE(T)                                                                        \
    template void example_signs<T>(const ExampleBlock&, int64_t, int64_t, T*);                         \
    template void example_signs_at<T>(const ExampleBlock&, int64_t, const int64_t*, int64_t, T*);      \
    template void example_row_signs<T>(const ExampleBlock&, int64_t, const int64_t*, int64_t, int64_t, \
                                       int64_t, T*);                                                   \
    template void row_dots<T>(int64_t, int64_t, const T*, const T*, double*);
FLATCORE_INSTANTIATE(float)
FLATCORE_INSTANTIATE(double)

}  // namespace flatcore
