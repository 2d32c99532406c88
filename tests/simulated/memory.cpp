// Memory of the devices and pinned memory, which are the host's; copies.
#include "runtime.h"

#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>

namespace simulated {
namespace {

std::map<uintptr_t, Memory> memories;  // by where they begin
std::array<size_t, kDevices> used{};

// Pages are taken when they are written: what a test reserves costs nothing.
cudaError_t take(void** out, size_t bytes, bool on_host) {
    const std::lock_guard lock(mutex);
    *out = nullptr;
    if (bytes == 0) return cudaSuccess;
    size_t& sum = used[static_cast<size_t>(device)];
    if (!on_host && sum + bytes > kDeviceBytes) return fail(cudaErrorMemoryAllocation);
    void* memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    memories[reinterpret_cast<uintptr_t>(memory)] = {bytes, on_host, device};
    if (!on_host) sum += bytes;
    *out = memory;
    return cudaSuccess;
}

cudaError_t give(void* memory) {
    if (!memory) return cudaSuccess;
    const std::lock_guard lock(mutex);
    const auto found = memories.find(reinterpret_cast<uintptr_t>(memory));
    if (found == memories.end()) {
        complain("memory freed that was not allocated");
        return fail(cudaErrorInvalidValue);
    }
    const Memory& at = found->second;
    if (!at.on_host) used[static_cast<size_t>(at.device)] -= at.bytes;
    munmap(memory, at.bytes);
    memories.erase(found);
    return cudaSuccess;
}

void check_room(const void* address, size_t bytes, const char* what) {
    size_t room = 0;
    if (find(address, &room) && room < bytes) complain(std::string(what) + " leaves its memory");
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    if (const cudaError_t status = enter(stream, "a copy")) return fail(status);
    check_room(to, bytes, "destination of a copy");
    check_room(from, bytes, "source of a copy");
    Stream& on = stream_of(stream);
    if (!on.recording()) {
        std::memmove(to, from, bytes);
    } else if (!find(to) || !find(from)) {  // neither a device's nor pinned
        invalidate(on, "copy of pageable memory in a recording");
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

}  // namespace

const Memory* find(const void* address, size_t* room) {
    const std::lock_guard lock(mutex);
    const auto at = reinterpret_cast<uintptr_t>(address);
    auto found = memories.upper_bound(at);
    if (found == memories.begin()) return nullptr;
    --found;
    const uintptr_t end = found->first + found->second.bytes;
    if (at >= end) return nullptr;
    if (room) *room = end - at;
    return &found->second;
}

}  // namespace simulated

using namespace simulated;

SIMULATED cudaError_t cudaMalloc(void** out, size_t bytes) {
    if (forbidden("cudaMalloc")) return fail(cudaErrorStreamCaptureUnsupported);
    return take(out, bytes, false);
}
SIMULATED cudaError_t cudaFree(void* memory) {
    if (memory && forbidden("cudaFree")) return fail(cudaErrorStreamCaptureUnsupported);
    return give(memory);
}
SIMULATED cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
    if (forbidden("cudaHostAlloc")) return fail(cudaErrorStreamCaptureUnsupported);
    return take(out, bytes, true);
}
SIMULATED cudaError_t cudaFreeHost(void* memory) { return give(memory); }
SIMULATED cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    const std::lock_guard lock(mutex);
    *total = kDeviceBytes;
    *free = kDeviceBytes - used[static_cast<size_t>(device)];
    return cudaSuccess;
}
SIMULATED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
    const Memory* at = find(address);
    *out = {};
    out->type = !at ? cudaMemoryTypeUnregistered : at->on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    out->device = at ? at->device : -1;
    if (at) out->devicePointer = const_cast<void*>(address);
    if (at && at->on_host) out->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}

SIMULATED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                      cudaStream_t stream) {
    return copy(to, from, bytes, stream);
}
SIMULATED cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    if (forbidden("cudaMemcpy")) return fail(cudaErrorStreamCaptureUnsupported);
    return copy(to, from, bytes, nullptr);
}
SIMULATED cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                          cudaStream_t stream) {
    return copy(to, from, bytes, stream);
}
SIMULATED cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                        size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t i = 0; i < height; ++i)
        if (const cudaError_t status = copy(static_cast<char*>(to) + i * to_pitch,
                                            static_cast<const char*>(from) + i * from_pitch, width, stream))
            return status;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    if (const cudaError_t status = enter(stream, "a memset")) return fail(status);
    check_room(to, bytes, "a memset");
    if (!stream_of(stream).recording()) std::memset(to, value, bytes);
    return cudaSuccess;
}
SIMULATED cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, nullptr);
}
