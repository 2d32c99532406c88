// Devices, errors and launches, and what the tests read.
#include "runtime.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simulated {
namespace {

thread_local cudaError_t last = cudaSuccess;
std::string complaints;

struct Kernel {
    std::string name;
    size_t shared_limit = kSharedBytes;
};
// By the address of the host's function.
std::unordered_map<const void*, Kernel>& kernels() {
    static std::unordered_map<const void*, Kernel>
        all;  // torch's libraries register theirs while they are loaded
    return all;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

std::string readable(const char* symbol) {
    int status = 0;
    char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string result = name ? name : symbol;
    std::free(name);
    return result;
}

cudaError_t launch_function(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    const auto found = kernels().find(function);
    if (found == kernels().end()) {
        complain("launch of a function that was not registered");
        return fail(cudaErrorInvalidDeviceFunction);
    }
    const Kernel& kernel = found->second;
    return launch(kernel.name, grid, block, shared, kernel.shared_limit, stream);
}

}  // namespace

void complain(const std::string& what) {
    const std::lock_guard lock(mutex);
    complaints += what + '\n';
}

cudaError_t fail(cudaError_t status) {
    last = status;
    return status;
}

cudaError_t launch(const std::string& kernel, dim3 grid, dim3 block, size_t shared, size_t shared_limit,
                   cudaStream_t stream) {
    if (const cudaError_t status = enter(stream, kernel)) return fail(status);
    const auto threads = size_t{block.x} * block.y * block.z;
    const bool empty = !threads || !grid.x || !grid.y || !grid.z;
    const bool large = grid.x > 0x7FFFFFFFu || grid.y > kLargestGrid || grid.z > kLargestGrid ||
                       threads > kBlockThreads || block.z > 64 || shared > shared_limit;
    if (!empty && !large) return cudaSuccess;
    char sizes[200];
    std::snprintf(sizes, sizeof sizes,
                  "launch of (%u, %u, %u) blocks of (%u, %u, %u) threads, %zu bytes shared: ", grid.x, grid.y,
                  grid.z, block.x, block.y, block.z, shared);
    complain(sizes + readable(kernel.c_str()));
    return fail(cudaErrorInvalidConfiguration);
}

}  // namespace simulated

using namespace simulated;

// --- what the tests read

// All complaints since the last call, one a line.
SIMULATED const char* simulated_complaints() {
    const std::lock_guard lock(mutex);
    static std::string told;
    told = std::exchange(complaints, {});
    return told.c_str();
}

SIMULATED void simulated_counts(long* out) {
    const std::lock_guard lock(mutex);
    out[0] = counts.launches;
    out[1] = counts.recorded;
    out[2] = counts.graphs;
    out[3] = counts.replays;
}

// From flatcore's own launches (launches.cpp), which then run as emulated threads.
SIMULATED int simulated_launch(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                               void* stream) {
    const std::lock_guard lock(mutex);
    return simulated::launch(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                             shared, kLargestSharedBytes, static_cast<cudaStream_t>(stream));
}

// --- kernels: what nvcc writes into every library, then launches

SIMULATED void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
SIMULATED void __cudaRegisterFatBinaryEnd(void**) {}
SIMULATED void __cudaUnregisterFatBinary(void**) {}
SIMULATED char __cudaInitModule(void**) { return 1; }
SIMULATED void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
SIMULATED void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                                      uint3*, dim3*, dim3*, int*) {
    const std::lock_guard lock(mutex);
    kernels()[function].name = name;
}
SIMULATED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
SIMULATED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
SIMULATED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Configuration top = configurations.back();
    configurations.pop_back();
    *grid = top.grid;
    *block = top.block;
    *shared = top.shared;
    *static_cast<cudaStream_t*>(stream) = top.stream;
    return cudaSuccess;
}
SIMULATED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                                         cudaStream_t stream) {
    return launch_function(kernel, grid, block, shared, stream);
}
SIMULATED cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared,
                                       cudaStream_t stream) {
    return launch_function(function, grid, block, shared, stream);
}
SIMULATED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* at, const void* function, void**) {
    return launch_function(function, at->gridDim, at->blockDim, at->dynamicSmemBytes, at->stream);
}
SIMULATED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
    *out = {};
    out->maxThreadsPerBlock = kBlockThreads;
    out->maxDynamicSharedSizeBytes = kSharedBytes;
    out->numRegs = 32;
    out->binaryVersion = out->ptxVersion = 90;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
    const std::lock_guard lock(mutex);
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > kLargestSharedBytes) return fail(cudaErrorInvalidValue);
    kernels()[function].shared_limit = static_cast<size_t>(std::max(value, kSharedBytes));
    return cudaSuccess;
}
SIMULATED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                             size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

// --- devices

SIMULATED cudaError_t cudaGetDeviceCount(int* count) {
    *count = kDevices;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaGetDevice(int* out) {
    *out = device;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= kDevices) return fail(cudaErrorInvalidDevice);
    device = index;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
    std::memset(out, 0, sizeof *out);
    std::strcpy(out->name, "simulated");
    out->major = 9;
    out->totalGlobalMem = kDeviceBytes;
    out->multiProcessorCount = 132;
    out->warpSize = 32;
    out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = kBlockThreads;
    out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = 0x7FFFFFFF;
    out->maxGridSize[1] = out->maxGridSize[2] = kLargestGrid;
    out->maxThreadsPerMultiProcessor = 2048;
    out->maxBlocksPerMultiProcessor = 32;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->sharedMemPerBlock = kSharedBytes;
    out->sharedMemPerBlockOptin = kLargestSharedBytes;
    out->sharedMemPerMultiprocessor = 228 << 10;
    out->l2CacheSize = 50 << 20;
    out->unifiedAddressing = out->canMapHostMemory = out->concurrentKernels = 1;
    out->textureAlignment = 512;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr which, int) {
    switch (which) {
    case cudaDevAttrMultiProcessorCount:
        *out = 132;
        break;
    case cudaDevAttrMaxThreadsPerBlock:
        *out = kBlockThreads;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *out = 2048;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *out = kSharedBytes;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *out = kLargestSharedBytes;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *out = 9;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *out = 0;
        break;
    case cudaDevAttrWarpSize:
        *out = 32;
        break;
    default:
        *out = 1;
    }
    return cudaSuccess;
}
SIMULATED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
SIMULATED cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaDeviceSynchronize() {
    return forbidden("cudaDeviceSynchronize") ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
SIMULATED cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                       unsigned long long,
                                                       cudaDriverEntryPointQueryResult* result) {
    *function = nullptr;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorNotSupported;
}

// --- errors

SIMULATED cudaError_t cudaGetLastError() { return std::exchange(simulated::last, cudaSuccess); }
SIMULATED cudaError_t cudaPeekAtLastError() { return simulated::last; }
SIMULATED const char* cudaGetErrorString(cudaError_t status) {
    thread_local char text[64];
    std::snprintf(text, sizeof text, "%s (simulated CUDA, status %d)",
                  status == cudaErrorMemoryAllocation ? "out of memory" : "refused",
                  static_cast<int>(status));
    return text;
}
SIMULATED const char* cudaGetErrorName(cudaError_t) { return "simulated"; }
