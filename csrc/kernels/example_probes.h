// Random signs for every example of its own: an element depends on (seed, probe, example, element) alone, so
// an example meets the same probe whatever batch it comes in, and a parameter the same wherever it is used.
#pragma once

#include <cstdint>

namespace flatcore {

// Which probes and examples a block of signs is for; both are counted from the beginning of the data.
struct ExampleBlock {
    uint64_t seed;
    int64_t first_probe, probes;
    int64_t first_example, examples;
};

// out (probes, examples, count): the signs of elements first, first + 1, ...
template <class T>
void example_signs(const ExampleBlock& block, int64_t first, int64_t count, T* out);

// out (probes, examples, count): the signs of elements offset + elements[0], offset + elements[1], ...
template <class T>
void example_signs_at(const ExampleBlock& block, int64_t offset, const int64_t* elements, int64_t count,
                      T* out);

// out (probes, examples, rows, width): row r of an example holds the signs of row index[example, r] of a
// matrix of that width that begins at element offset; zeros where the index is `frozen`.
template <class T>
void example_row_signs(const ExampleBlock& block, int64_t offset, const int64_t* index, int64_t rows,
                       int64_t width, int64_t frozen, T* out);

// out[r] = <a_r, b_r> for rows of length `width`, summed in double.
template <class T>
void row_dots(int64_t rows, int64_t width, const T* a, const T* b, double* out);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same four on a device; `stream` is a cudaStream_t. Signs are the CPU's bit for bit; a dot's terms are
// added in another order.
template <class T>
void example_signs(const ExampleBlock& block, int64_t first, int64_t count, T* out, void* stream);
template <class T>
void example_signs_at(const ExampleBlock& block, int64_t offset, const int64_t* elements, int64_t count,
                      T* out, void* stream);
template <class T>
void example_row_signs(const ExampleBlock& block, int64_t offset, const int64_t* index, int64_t rows,
                       int64_t width, int64_t frozen, T* out, void* stream);
template <class T>
void row_dots(int64_t rows, int64_t width, const T* a, const T* b, double* out, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
