// CUDA's runtime over the host's memory, for a CUDA build of torch and of flatcore where there is no GPU.
// Device memory is host memory, everything is done at once and in the calling thread, and the kernels of
// torch and of CUDA's libraries do nothing (numerics.py does their work). What a program may ask of CUDA is
// checked as CUDA checks it, or more strictly: what would fail or be wrong on a device is a complaint, and
// the plugin of the tests fails on any.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <mutex>
#include <string>
#include <thread>

// The library is loaded before CUDA's own, and its functions of the same names are taken.
#define SIMULATED extern "C" __attribute__((visibility("default")))

namespace simulated {

constexpr int kDevices = 2;
constexpr size_t kDeviceBytes = size_t{141} << 30;  // of each, as an H200 has
constexpr int kSharedBytes = 48 << 10;              // of a block, unless it asks for more
constexpr int kLargestSharedBytes = 227 << 10;
constexpr unsigned kLargestGrid = 65535;  // in y and z
constexpr unsigned kBlockThreads = 1024;

struct Stream {
    int device = 0;
    int priority = 0;
    unsigned long long id = 0;
    // While it is recorded: the stream whose recording it has joined, perhaps itself.
    Stream* origin = nullptr;
    bool invalid = false;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id thread;

    bool recording() const { return origin != nullptr; }
};

struct Memory {
    size_t bytes;
    bool on_host;  // pinned
    int device;
};

struct Counts {
    long launches = 0;  // kernels, matrix products, copies and sets
    long recorded = 0;  // of these into graphs
    long graphs = 0;    // recorded
    long replays = 0;
};

inline std::recursive_mutex mutex;  // of all that follows
inline Counts counts;
inline thread_local int device = 0;  // the current one

void complain(const std::string& what);
// Remembers the status for cudaGetLastError.
cudaError_t fail(cudaError_t status);

// The allocation that an address lies in, or null; `room`: bytes from there to its end.
const Memory* find(const void* address, size_t* room = nullptr);

Stream& stream_of(cudaStream_t handle);
// Before anything is put on a stream.
cudaError_t enter(cudaStream_t stream, const std::string& what);
// For calls that CUDA refuses while this thread, or in the global mode any, is recording. Complains and ends
// the recording.
bool forbidden(const char* what);
void invalidate(Stream& stream, const std::string& what);

cudaError_t launch(const std::string& kernel, dim3 grid, dim3 block, size_t shared, size_t shared_limit,
                   cudaStream_t stream);

}  // namespace simulated
