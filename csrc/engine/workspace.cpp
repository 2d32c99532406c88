#include "workspace.h"

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/safe_numerics.h>
#include <pthread.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace flatcore {

namespace {

constexpr size_t kSmallest = size_t{1} << 14;   // the C library serves less from pages it has
constexpr size_t kAlignment = 256;              // of every buffer; two cache lines, more than any vector
constexpr size_t kPage = size_t{1} << 21;       // a large page: one fault instead of 512
constexpr size_t kLargeRows = size_t{1} << 20;  // for what is smaller a page more or less does not matter
constexpr size_t kSpares = 2;                   // the directions and the products
// Room for the gaps between buffers where one chunk has to hold what several did.
constexpr double kGaps = 1.125;

size_t rounded(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// Where it is refused, pages are small.
void advise_large_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
    madvise(begin, bytes, MADV_HUGEPAGE);
#endif
}

struct Chunk {
    char* base;
    size_t size;
    std::map<size_t, size_t> free;  // offset -> bytes, no two adjacent
};

// Memory of a matrix that leaves a product.
struct Rows {
    void* data;
    size_t bytes, most;
};

thread_local int entered = 0;

// In place of torch's own allocator, which it asks for all that is small or not for a product.
class Pool final : public c10::Allocator {
 public:
    // Never destroyed: tensors may outlive any static.
    static Pool& instance() {
        static Pool& pool = *new Pool(c10::GetCPUAllocator());
        static const bool installed = pool.install();
        (void)installed;
        return pool;
    }

    c10::DataPtr allocate(size_t bytes) override {
        void* data = entered > 0 && bytes >= kSmallest ? take(bytes) : nullptr;
        if (data)
            c10::profiledCPUMemoryReporter().New(data, bytes);
        else
            data = others_->raw_allocate(bytes);
        return {data, data, &Pool::release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &Pool::release; }
    void copy_data(void* to, const void* from, size_t bytes) const override {
        default_copy_data(to, from, bytes);
    }

    void add_user() {
        const std::lock_guard lock(mutex_);
        ++users_;
    }
    void remove_user() {
        const std::lock_guard lock(mutex_);
        if (--users_ > 0) return;
        free_idle_chunks();
        free_spares();
    }

    // Empty where the system has no more memory.
    c10::DataPtr allocate_rows(size_t bytes, size_t most) {
        void* data = nullptr;
        size_t size = rounded(bytes, kPage);
        {
            const std::lock_guard lock(mutex_);
            const auto fits = [&](const Rows& spare) {
                return spare.bytes >= size && spare.bytes <= size + size / 4;
            };
            const auto found = std::find_if(spares_.begin(), spares_.end(), fits);
            if (found != spares_.end()) {
                data = found->data;
                size = found->bytes;
                spares_.erase(found);
            } else {
                free_spares();  // of other sizes than are asked for now
            }
        }
        if (!data) {
            data = std::aligned_alloc(kPage, size);
            if (!data) return {};
            advise_large_pages(data, size);
        }
        c10::profiledCPUMemoryReporter().New(data, bytes);
        return {data, new Rows{data, size, most}, &Pool::release_rows, c10::Device(c10::DeviceType::CPU)};
    }
    int64_t spare_bytes() {
        const std::lock_guard lock(mutex_);
        return static_cast<int64_t>(idle_bytes());
    }
    int64_t bytes() {
        const std::lock_guard lock(mutex_);
        return static_cast<int64_t>(held_);
    }

 private:
    explicit Pool(c10::Allocator* others) : others_(others) {}

    // An allocator whose memory cannot be freed by address stays alone, and products go without chunks.
    bool install() {
        if (!others_->raw_deleter()) return false;
        // A thread that holds the lock is not in a forked child to let it go.
        pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                       [] { instance().mutex_.unlock(); });
        c10::SetCPUAllocator(this);
        return true;
    }

    static void release(void* data) {
        Pool& pool = instance();
        if (!pool.give_back(data)) pool.others_->raw_deallocate(data);
    }

    static void release_rows(void* context) {
        const std::unique_ptr<Rows> rows(static_cast<Rows*>(context));
        c10::profiledCPUMemoryReporter().Delete(rows->data);
        Pool& pool = instance();
        const std::lock_guard lock(pool.mutex_);
        if (pool.users_ > 0 && pool.spares_.size() < kSpares && pool.idle_bytes() + rows->bytes <= rows->most)
            pool.spares_.push_back(*rows);
        else
            std::free(rows->data);
    }

    size_t idle_bytes() const {
        size_t bytes = 0;
        for (const Rows& spare : spares_) bytes += spare.bytes;
        return bytes;
    }

    void free_spares() {
        for (const Rows& spare : spares_) std::free(spare.data);
        spares_.clear();
    }

    // nullptr where the system has no more memory: then torch's allocator says so.
    void* take(size_t bytes) {
        const size_t size = rounded(bytes, kAlignment);
        const std::lock_guard lock(mutex_);
        if (in_use_ == 0 && chunks_.size() > 1) free_idle_chunks();
        Chunk* chunk = nullptr;
        std::map<size_t, size_t>::iterator found;
        for (Chunk& candidate : chunks_)
            for (auto gap = candidate.free.begin(); gap != candidate.free.end(); ++gap)
                if (gap->second >= size && (!chunk || gap->second < found->second)) {
                    chunk = &candidate;
                    found = gap;
                }
        if (!chunk) {
            chunk = add_chunk(size);
            if (!chunk) return nullptr;
            found = chunk->free.begin();
        }
        const auto [offset, room] = *found;
        chunk->free.erase(found);
        if (room > size) chunk->free.emplace(offset + size, room - size);
        char* data = chunk->base + offset;
        buffers_.emplace(data, size);
        in_use_ += size;
        most_ = std::max(most_, in_use_);
        return data;
    }

    bool give_back(void* data) {
        // Most of the process's tensors are not from here and need no lock.
        const auto address = reinterpret_cast<uintptr_t>(data);
        if (address < low_ || address >= high_) return false;
        const std::lock_guard lock(mutex_);
        const auto buffer = buffers_.find(data);
        if (buffer == buffers_.end()) return false;
        c10::profiledCPUMemoryReporter().Delete(data);
        const size_t size = buffer->second;
        buffers_.erase(buffer);
        in_use_ -= size;
        for (Chunk& chunk : chunks_) {
            const auto* place = static_cast<char*>(data);
            if (place < chunk.base || place >= chunk.base + chunk.size) continue;
            auto gap = chunk.free.emplace(static_cast<size_t>(place - chunk.base), size).first;
            const auto next = std::next(gap);
            if (next != chunk.free.end() && gap->first + gap->second == next->first) {
                gap->second += next->second;
                chunk.free.erase(next);
            }
            if (gap != chunk.free.begin()) {
                const auto previous = std::prev(gap);
                if (previous->first + previous->second == gap->first) {
                    previous->second += gap->second;
                    chunk.free.erase(gap);
                }
            }
        }
        if (users_ == 0) free_idle_chunks();
        return true;
    }

    // One chunk for the most that was ever in use, once that is known; until then they double.
    Chunk* add_chunk(size_t size) {
        const auto known = static_cast<size_t>(kGaps * static_cast<double>(most_));
        const size_t wanted = std::max(size, chunks_.empty() ? known : held_);
        const size_t unit = wanted < kPage ? kAlignment : kPage, bytes = rounded(wanted, unit);
        void* base = std::aligned_alloc(unit, bytes);
        if (!base) return nullptr;
        if (unit == kPage) advise_large_pages(base, bytes);
        chunks_.push_back({static_cast<char*>(base), bytes, {{0, bytes}}});
        held_ += bytes;
        update_range();
        return &chunks_.back();
    }

    void free_idle_chunks() {
        std::erase_if(chunks_, [&](const Chunk& chunk) {
            const bool idle = chunk.free.size() == 1 && chunk.free.begin()->second == chunk.size;
            if (idle) {
                held_ -= chunk.size;
                std::free(chunk.base);
            }
            return idle;
        });
        if (users_ == 0) most_ = in_use_;
        update_range();
    }

    void update_range() {
        uintptr_t low = UINTPTR_MAX, high = 0;
        for (const Chunk& chunk : chunks_) {
            low = std::min(low, reinterpret_cast<uintptr_t>(chunk.base));
            high = std::max(high, reinterpret_cast<uintptr_t>(chunk.base) + chunk.size);
        }
        low_ = low;
        high_ = high;
    }

    c10::Allocator* const others_;
    std::mutex mutex_;
    std::vector<Chunk> chunks_;
    std::unordered_map<void*, size_t> buffers_;
    std::vector<Rows> spares_;
    std::atomic<uintptr_t> low_{UINTPTR_MAX}, high_{0};
    size_t held_ = 0, in_use_ = 0, most_ = 0;
    int64_t users_ = 0;
};

}  // namespace

Workspace::Workspace() {
    Pool::instance();
    ++entered;
}
Workspace::~Workspace() { --entered; }

WorkspaceUser::WorkspaceUser() { Pool::instance().add_user(); }
WorkspaceUser::~WorkspaceUser() { Pool::instance().remove_user(); }

at::Tensor fresh_rows(int64_t K, int64_t P, const at::TensorOptions& options, int64_t most) {
    const c10::InferenceMode off(false);
    const caffe2::TypeMeta type = options.dtype();
    uint64_t bytes = 0;
    const bool too_many = c10::mul_overflows(static_cast<uint64_t>(K), static_cast<uint64_t>(P), &bytes) ||
                          c10::mul_overflows(bytes, type.itemsize(), &bytes);
    if (too_many || !options.device().is_cpu() || bytes < kLargeRows) return at::empty({K, P}, options);
    c10::DataPtr memory =
        Pool::instance().allocate_rows(bytes, static_cast<size_t>(std::max<int64_t>(most, 0)));
    if (!memory) return at::empty({K, P}, options);  // torch's allocator says that there is none
    auto storage =
        c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, std::move(memory),
                                              c10::GetCPUAllocator(), /*resizable=*/true);
    at::Tensor rows = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), type);
    rows.unsafeGetTensorImpl()->set_sizes_contiguous({K, P});
    return rows;
}

int64_t spare_bytes() { return Pool::instance().spare_bytes(); }

int64_t workspace_bytes() { return Pool::instance().bytes(); }

}  // namespace flatcore
