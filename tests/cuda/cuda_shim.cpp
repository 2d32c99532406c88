#include "kernels/cuda_shim.h"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace flatcore::cuda {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kGarbageByte = 0x7F;  // 3.4e38 as a float, 1.4e306 as a double
constexpr uint64_t kGarbage = 0x7F7F7F7F7F7F7F7F;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

bool same(const std::source_location& a, const std::source_location& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           std::string_view(a.file_name()) == b.file_name();
}

// One stack to switch to and from. The sanitizer is told of every switch, or it takes the other stack for an
// overflow.
struct Context {
    ucontext_t registers;
    void* sanitizer_stack = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
};

void switch_to([[maybe_unused]] Context& from, Context& to, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer_stack, to.bottom, to.size);
#endif
    swapcontext(&from.registers, &to.registers);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.sanitizer_stack, nullptr, nullptr);
#endif
}

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    int number = 0;
    State state = State::ready;
    std::source_location place;
    uint32_t mask = 0;
    unsigned exchanges = 0;
};

// What lanes leave for each other. One can be at most one exchange ahead of another that has not read yet, so
// two sets of values are enough.
using LaneValues = std::array<uint64_t, 32>;
struct Warp {
    std::array<LaneValues, 2> values;
    std::array<std::array<LaneWords, 32>, 2> words;
};

struct Block {
    std::span<Fiber> fibers;
    std::vector<Warp> warps;
    const std::function<void()>* thread = nullptr;
    Context scheduler;
    Fiber* current = nullptr;
};

Block* running = nullptr;
std::unique_ptr<unsigned char[]> memory_of_launch;
std::vector<Fiber> all_fibers(1024);  // kept from launch to launch for their stacks
std::vector<std::pair<void*, size_t>>& shared_arrays() {
    static std::vector<std::pair<void*, size_t>> arrays;
    return arrays;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    Context& scheduler = running->scheduler;
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
    (*running->thread)();
    running->current->state = State::done;
    switch_to(running->current->context, running->scheduler, /*last=*/true);
}

void wait(State state, uint32_t mask, std::source_location place) {
    Fiber& fiber = *running->current;
    fiber.state = state;
    fiber.mask = mask;
    fiber.place = place;
    switch_to(fiber.context, running->scheduler);
}

const LaneValues& leave_value(uint32_t mask, uint64_t value, std::source_location place) {
    Fiber& fiber = *running->current;
    LaneValues& values = running->warps[static_cast<size_t>(fiber.number / 32)].values[fiber.exchanges++ % 2];
    values[static_cast<size_t>(fiber.number % 32)] = value;
    wait(State::at_warp_barrier, mask, place);
    return values;
}

void run_fiber(Fiber& fiber) {
    running->current = &fiber;
    threadIdx = fiber.index;
    switch_to(running->scheduler, fiber.context);
}

void prepare(Fiber& fiber, int number, dim3 block) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.number = number;
    fiber.index = dim3(number % block.x, number / block.x % block.y, number / (block.x * block.y));
    fiber.state = State::ready;
    fiber.exchanges = 0;
    fiber.context.sanitizer_stack = nullptr;
    fiber.context.bottom = fiber.stack.get();
    fiber.context.size = kStackBytes;
    getcontext(&fiber.context.registers);
    fiber.context.registers.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.registers.uc_stack.ss_size = kStackBytes;
    fiber.context.registers.uc_link = nullptr;
    makecontext(&fiber.context.registers, fiber_main, 0);
}

[[noreturn]] void divergent(const Fiber& fiber) {
    throw std::logic_error("divergent barrier: thread " + std::to_string(fiber.number) + " of block (" +
                           std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                           ") waits in line " + std::to_string(fiber.place.line()) +
                           " for threads that are elsewhere");
}

bool wait_alike(const Fiber& a, const Fiber& b) {
    return a.state == b.state && same(a.place, b.place) && a.mask == b.mask;
}

// Frees the threads of a block whose barrier is complete.
bool release_block(Block& block) {
    const Fiber& first = block.fibers[0];
    if (first.state != State::at_block_barrier ||
        !std::ranges::all_of(block.fibers, [&](const Fiber& f) { return wait_alike(first, f); }))
        return false;
    for (Fiber& fiber : block.fibers) fiber.state = State::ready;
    return true;
}

// Frees the lanes of a warp whose barrier is complete. True when there were some.
bool release_warp(std::span<Fiber> lanes) {
    bool freed = false;
    for (const Fiber& first : lanes) {
        if (first.state != State::at_warp_barrier) continue;
        std::vector<Fiber*> group;
        for (size_t lane = 0; lane < lanes.size(); ++lane)
            if (first.mask >> lane & 1) group.push_back(&lanes[lane]);
        if (!std::ranges::all_of(group, [&](const Fiber* f) { return wait_alike(first, *f); })) continue;
        for (Fiber* fiber : group) fiber->state = State::ready;
        freed = true;
    }
    return freed;
}

void run_ready(std::span<Fiber> lanes) {
    for (size_t i = 0; i < lanes.size(); ++i) {
        Fiber& fiber = lanes[thread_order == Order::forward ? i : lanes.size() - 1 - i];
        if (fiber.state == State::ready) run_fiber(fiber);
    }
}

// A warp runs to a barrier of the block before another one starts, so that it is as far ahead of the others
// as it can be on a device.
void run_block(Block& block) {
    const size_t warps = block.warps.size();
    while (true) {
        for (size_t i = 0; i < warps; ++i) {
            const size_t start = 32 * (thread_order == Order::forward ? i : warps - 1 - i);
            const auto lanes = block.fibers.subspan(start, std::min<size_t>(32, block.fibers.size() - start));
            do run_ready(lanes);
            while (release_warp(lanes));
        }
        const auto waiting =
            std::ranges::find_if(block.fibers, [](const Fiber& f) { return f.state != State::done; });
        if (waiting == block.fibers.end()) return;
        if (!release_block(block)) divergent(*waiting);
    }
}

}  // namespace

void run_grid(dim3 grid, dim3 block_size, size_t shared, const std::function<void()>& thread) {
    static std::mutex one_at_a_time;  // the emulated threads are all of one
    const std::lock_guard lock(one_at_a_time);
    const size_t count = size_t{block_size.x} * block_size.y * block_size.z;
    constexpr size_t kMostShared = 99 << 10;  // of compute capability 8.6
    if (count == 0 || count > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 ||
        shared > kMostShared)
        throw std::invalid_argument("CUDA launch: invalid configuration");
    memory_of_launch.reset(new unsigned char[shared]);  // of this size, so that the sanitizer knows its end
    Block block;
    block.fibers = std::span(all_fibers).first(count);
    block.warps = std::vector<Warp>((count + 31) / 32);
    block.thread = &thread;
    running = &block;
    blockDim = block_size;
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                for (const auto& [memory, bytes] : shared_arrays()) std::memset(memory, kGarbageByte, bytes);
                std::memset(memory_of_launch.get(), kGarbageByte, shared);
                for (size_t i = 0; i < count; ++i) prepare(block.fibers[i], static_cast<int>(i), block_size);
                run_block(block);
            }
}

void wait_for_block(std::source_location place) { wait(State::at_block_barrier, 0, place); }
void wait_for_warp(uint32_t mask, std::source_location place) { wait(State::at_warp_barrier, mask, place); }

int lane() { return running->current->number % 32; }

uint64_t exchange(uint32_t mask, uint64_t value, int source, std::source_location place) {
    const auto& values = leave_value(mask, value, place);
    return mask >> source & 1 ? values[static_cast<size_t>(source)] : kGarbage;
}

uint32_t ballot(uint32_t mask, bool predicate, std::source_location place) {
    const auto& values = leave_value(mask, predicate, place);
    uint32_t result = 0;
    for (uint32_t other = 0; other < 32; ++other)
        if (mask >> other & 1 && values[other] == 1) result |= 1u << other;
    return result;
}

const std::array<LaneWords, 32>& exchange_words(const LaneWords& words, std::source_location place) {
    Fiber& fiber = *running->current;
    auto& of_warp = running->warps[static_cast<size_t>(fiber.number / 32)].words[fiber.exchanges++ % 2];
    of_warp[static_cast<size_t>(fiber.number % 32)] = words;
    wait(State::at_warp_barrier, ~0u, place);
    return of_warp;
}

unsigned char* shared_of_launch() { return memory_of_launch.get(); }

void* shared_bytes(size_t bytes) {
    void* memory = ::operator new(bytes);
    std::memset(memory, kGarbageByte, bytes);
    shared_arrays().push_back({memory, bytes});
    return memory;
}

}  // namespace flatcore::cuda
