// Calls a kernel on the device that a tensor is on. Kernels for the CPU and for CUDA have the same name,
// template parameters and arguments; those for CUDA stand in namespace cuda and take the stream as well.
//
// Three builds share the engine's text: without CUDA; with CUDA (FLATCORE_WITH_CUDA); and the emulated one
// (FLATCORE_CUDA_SHIM), in which every kernel call takes the CUDA path, run by emulated threads over the
// host's memory, so that the engine's calls are tested where there is no GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <stdexcept>
#include <string>

#if defined(FLATCORE_WITH_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

namespace flatcore {

// The builds' own namespaces: an object file of one in a library of another must not bring its functions
// along.
#if defined(FLATCORE_CUDA_SHIM)
inline namespace emulated {

constexpr const char* kGpu = "emulated";
inline bool on_gpu(const at::Device&) { return true; }
inline void* stream_of(const at::Tensor&) { return nullptr; }

#elif defined(FLATCORE_WITH_CUDA)
inline namespace with_cuda {

constexpr const char* kGpu = "cuda";
inline bool on_gpu(const at::Device& device) { return device.is_cuda(); }
inline void* stream_of(const at::Tensor& t) {
    return c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
}

#else
inline namespace without_cuda {

constexpr const char* kGpu = "none";
inline bool on_gpu(const at::Device&) { return false; }
template <class... Arguments>
[[noreturn]] void no_gpu(const char* kernel, const Arguments&...) {
    throw std::logic_error(std::string(kernel) + ": flatcore was built without CUDA");
}

#endif

inline bool on_gpu(const at::Tensor& t) { return on_gpu(t.device()); }

}  // namespace emulated, with_cuda or without_cuda

#if defined(FLATCORE_CUDA_SHIM) || defined(FLATCORE_WITH_CUDA)
#define FLATCORE_RUN(tensor, kernel, ...)                                          \
    (::flatcore::on_gpu(tensor) ? FLATCORE_RUN_ON_GPU(tensor, kernel, __VA_ARGS__) \
                                : ::flatcore::kernel(__VA_ARGS__))
// Of a kernel that only a GPU has.
#define FLATCORE_RUN_ON_GPU(tensor, kernel, ...)                                   \
    [&](const at::Tensor& flatcore_on) {                                           \
        const c10::DeviceGuard flatcore_device(flatcore_on.device());              \
        ::flatcore::cuda::kernel(__VA_ARGS__, ::flatcore::stream_of(flatcore_on)); \
    }(tensor)
#else
#define FLATCORE_RUN(tensor, kernel, ...) ::flatcore::kernel(__VA_ARGS__)
#define FLATCORE_RUN_ON_GPU(tensor, kernel, ...) ::flatcore::no_gpu(#kernel, __VA_ARGS__)
#endif

}  // namespace flatcore
