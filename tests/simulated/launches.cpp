// flatcore's own launches are put before the simulated runtime as well, which then runs the emulated threads.
#include "kernels/cuda_shim.h"

#include <stdexcept>

// Of runtime.cpp, in a library that is loaded before this one.
extern "C" int simulated_launch(const char* kernel, unsigned grid[3], unsigned block[3], size_t shared_bytes,
                                void* stream);

namespace {

void watch(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
    unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
    if (simulated_launch("flatcore's kernel", g, b, shared_bytes, stream))
        throw std::runtime_error("CUDA launch: refused by the simulated runtime");
}

const bool watching = (flatcore::cuda::launch_watcher = watch, true);

}  // namespace
