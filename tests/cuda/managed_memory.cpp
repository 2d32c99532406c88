// Every allocation of a test program as memory that the host and the device both see, so that the tests of
// the emulation, whose arrays are std::vectors, run on a GPU as they are. What CUDA allocates for itself
// meanwhile comes from the C library, as does what expect.h's OnHost asks for.
//
// Programs link the C++ library statically: else they would hand these two to every library of the process,
// those of the sanitizer among them, which allocate in the midst of a call of CUDA.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <new>

namespace {

// In front of every array; its size keeps the alignment that CUDA gives.
struct alignas(256) Header {
    bool managed;
};

}  // namespace

thread_local bool host_memory = false;

void* operator new(std::size_t bytes) {
    const bool managed = !host_memory;
    void* memory = nullptr;
    if (managed) {
        host_memory = true;
        const cudaError_t status = cudaMallocManaged(&memory, sizeof(Header) + bytes);
        host_memory = false;
        if (status != cudaSuccess) {
            std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
            std::abort();
        }
    } else {
        memory =
            std::aligned_alloc(alignof(Header), (2 * sizeof(Header) + bytes - 1) & ~(sizeof(Header) - 1));
        if (!memory) throw std::bad_alloc();
    }
    auto* header = static_cast<Header*>(memory);
    header->managed = managed;
    return header + 1;
}

void operator delete(void* array) noexcept {
    if (!array) return;
    Header* header = static_cast<Header*>(array) - 1;
    if (!header->managed) {
        std::free(header);
        return;
    }
    const bool before = host_memory;
    host_memory = true;
    cudaFree(header);  // fails when CUDA is gone at the program's end, and with it the memory
    host_memory = before;
}

void operator delete(void* array, std::size_t) noexcept { operator delete(array); }
