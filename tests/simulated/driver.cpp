// The few functions of the driver, and of cuSOLVER, whose answers torch goes on with.
#include "runtime.h"

#include <cstdint>

// --- the driver: a context is always there

SIMULATED int cuCtxGetCurrent(void** context) {
    static long some_context;
    *context = &some_context;
    return 0;
}
SIMULATED int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return 0;
}
// torch compiles a few pointwise kernels, exp2 for one, when they are first called.
SIMULATED int cuModuleLoadData(void** module, const void*) {
    static long some_module;
    *module = &some_module;
    return 0;
}
SIMULATED int cuModuleGetFunction(void** function, void* module, const char*) {
    *function = module;
    return 0;
}
SIMULATED int cuLaunchKernel(void*, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared, cudaStream_t stream, void**,
                             void**) {
    return simulated::launch("a kernel compiled by torch", {grid_x, grid_y, grid_z},
                             {block_x, block_y, block_z}, shared, simulated::kSharedBytes, stream);
}

// --- cuSOLVER: workspaces that nothing will be written to

SIMULATED int cusolverDnXpotrf_bufferSize(void*, void*, int, int64_t, int, const void*, int64_t, int,
                                          size_t* on_device, size_t* on_host) {
    *on_device = 256;
    *on_host = 0;
    return 0;
}
SIMULATED int cusolverDnDpotrf_bufferSize(void*, int, int, double*, int, int* count) {
    *count = 64;
    return 0;
}
SIMULATED int cusolverDnSpotrf_bufferSize(void*, int, int, float*, int, int* count) {
    *count = 64;
    return 0;
}
