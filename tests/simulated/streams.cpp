// Streams, events and what a recording of a stream (cudaStreamBeginCapture) may not do.
#include "runtime.h"

#include <array>
#include <chrono>
#include <memory>
#include <unordered_map>
#include <utility>

namespace simulated {
namespace {

struct Event {
    bool recorded = false;
    Stream* in_recording = nullptr;  // its origin
    std::chrono::steady_clock::time_point time;
};

std::unordered_map<cudaStream_t, std::unique_ptr<Stream>> streams;
std::array<Stream, kDevices> default_streams{};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

bool is_default(cudaStream_t stream) {
    return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

Event& event_of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

cudaError_t make(cudaStream_t* out, int priority) {
    const std::lock_guard lock(mutex);
    static unsigned long long number = 0;
    auto stream = std::make_unique<Stream>();
    stream->device = device;
    stream->priority = priority;
    stream->id = ++number;
    *out = reinterpret_cast<cudaStream_t>(stream.get());
    streams[*out] = std::move(stream);
    return cudaSuccess;
}

// Waiting for a stream, or asking whether it is done, has no meaning while it is recorded.
cudaError_t ask(cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    Stream& on = stream_of(stream);
    if (!on.recording()) return cudaSuccess;
    invalidate(on, "wait for, or question to, a stream that is recorded");
    return fail(cudaErrorStreamCaptureUnsupported);
}
cudaError_t ask(cudaEvent_t event) {
    const std::lock_guard lock(mutex);
    if (event_of(event).in_recording) {
        complain("wait for, or question to, an event of a recording");
        return fail(cudaErrorCapturedEvent);
    }
    return forbidden("wait for, or question to, an event") ? fail(cudaErrorStreamCaptureUnsupported)
                                                           : cudaSuccess;
}

}  // namespace

Stream& stream_of(cudaStream_t handle) {
    const std::lock_guard lock(mutex);
    if (const auto found = streams.find(handle); found != streams.end()) return *found->second;
    if (!is_default(handle)) complain("a stream that does not exist");
    Stream& stream = default_streams[static_cast<size_t>(device)];
    stream.device = device;
    return stream;
}

void invalidate(Stream& stream, const std::string& what) {
    stream.invalid = true;
    complain(what);
}

bool forbidden(const char* what) {
    const std::lock_guard lock(mutex);
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    for (const auto& entry : streams) {
        Stream& stream = *entry.second;
        if (!stream.recording() || stream.mode == cudaStreamCaptureModeRelaxed) continue;
        if (stream.mode != cudaStreamCaptureModeGlobal && stream.thread != std::this_thread::get_id())
            continue;
        invalidate(stream, std::string(what) + " in a recording");
        return true;
    }
    return false;
}

// Stricter than CUDA, which lets a copy go on the stream of another device, and forbids the default stream
// beside a recording only where streams wait for it: work there would be missing in the recording.
cudaError_t enter(cudaStream_t handle, const std::string& what) {
    const std::lock_guard lock(mutex);
    Stream& stream = stream_of(handle);
    if (stream.device != device) {
        complain("stream of device " + std::to_string(stream.device) + " on device " +
                 std::to_string(device) + ": " + what);
        return cudaErrorInvalidResourceHandle;
    }
    if (is_default(handle))
        for (const auto& entry : streams) {
            Stream& other = *entry.second;
            if (!other.recording() || other.device != device || other.thread != std::this_thread::get_id())
                continue;
            invalidate(other, "default stream in a recording: " + what);
            return cudaErrorStreamCaptureImplicit;
        }
    ++counts.launches;
    if (stream.recording()) ++counts.recorded;
    return cudaSuccess;
}

}  // namespace simulated

using namespace simulated;

SIMULATED cudaError_t cudaStreamCreate(cudaStream_t* out) { return make(out, 0); }
SIMULATED cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) { return make(out, 0); }
SIMULATED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
    return make(out, priority);
}
SIMULATED cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    streams.erase(stream);
    return cudaSuccess;
}
SIMULATED cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* out) {
    *out = stream_of(stream).priority;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return ask(stream); }
SIMULATED cudaError_t cudaStreamQuery(cudaStream_t stream) { return ask(stream); }
SIMULATED cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
    const std::lock_guard lock(mutex);
    Stream& on = stream_of(stream);
    const Event& event = event_of(handle);
    if (event.in_recording && !on.recording()) {  // it joins
        on.origin = event.in_recording;
        on.mode = on.origin->mode;
        on.thread = on.origin->thread;
    } else if (on.recording() && event.recorded && !event.in_recording) {
        invalidate(on, "wait in a recording for an event outside of it");
        return fail(cudaErrorStreamCaptureIsolation);
    }
    return cudaSuccess;
}

// --- recordings

SIMULATED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, simulated::thread_mode);
    return cudaSuccess;
}
SIMULATED cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    const std::lock_guard lock(mutex);
    Stream& on = stream_of(stream);
    if (simulated::is_default(stream)) return fail(cudaErrorStreamCaptureUnsupported);
    if (on.recording()) return fail(cudaErrorIllegalState);
    on.origin = &on;
    on.invalid = false;
    on.mode = mode;
    on.thread = std::this_thread::get_id();
    return cudaSuccess;
}
SIMULATED cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const std::lock_guard lock(mutex);
    Stream& on = stream_of(stream);
    *graph = nullptr;
    if (on.origin != &on) return fail(cudaErrorIllegalState);
    bool invalid = false;
    for (const auto& entry : simulated::streams) {
        Stream& other = *entry.second;
        if (other.origin != &on) continue;
        invalid |= std::exchange(other.invalid, false);
        other.origin = nullptr;
    }
    if (invalid) return fail(cudaErrorStreamCaptureInvalidated);
    static long some_graph;  // torch looks into none
    *graph = reinterpret_cast<cudaGraph_t>(&some_graph);
    ++counts.graphs;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
    const Stream& on = stream_of(stream);
    *out = !on.recording() ? cudaStreamCaptureStatusNone
           : on.invalid    ? cudaStreamCaptureStatusInvalidated
                           : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                               unsigned long long* id, cudaGraph_t* graph,
                                               const cudaGraphNode_t** dependencies,
                                               const cudaGraphEdgeData** edges, size_t* count) {
    const Stream& on = stream_of(stream);
    cudaStreamIsCapturing(stream, status);
    if (id) *id = on.recording() ? on.origin->id : 0;
    if (graph) *graph = nullptr;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                                    unsigned long long) {
    *out = reinterpret_cast<cudaGraphExec_t>(graph);
    return cudaSuccess;
}
SIMULATED cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
    *count = 1;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    if (const cudaError_t status = enter(stream, "a graph")) return fail(status);
    ++counts.replays;
    return cudaSuccess;
}
SIMULATED cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
SIMULATED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// --- events

SIMULATED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
    *out = reinterpret_cast<cudaEvent_t>(new simulated::Event);
    return cudaSuccess;
}
SIMULATED cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
SIMULATED cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete &simulated::event_of(event);
    return cudaSuccess;
}
SIMULATED cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    simulated::event_of(event) = {true, stream_of(stream).origin, std::chrono::steady_clock::now()};
    return cudaSuccess;
}
SIMULATED cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
SIMULATED cudaError_t cudaEventQuery(cudaEvent_t event) { return simulated::ask(event); }
SIMULATED cudaError_t cudaEventSynchronize(cudaEvent_t event) { return simulated::ask(event); }
SIMULATED cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    const std::chrono::duration<float, std::milli> passed =
        simulated::event_of(to).time - simulated::event_of(from).time;
    *milliseconds = passed.count();
    return cudaSuccess;
}
