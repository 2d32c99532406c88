#include "counted.h"

#include <atomic>
#include <limits>

#include "on_device.h"

namespace flatcore {

namespace {

std::atomic<int64_t> set_to{0};

}  // namespace

// Some of ATen's checks want less than the largest number.
int64_t most_counted(const at::Tensor& t) {
    if (const int64_t most = set_to) return most;
    return on_gpu(t) ? int64_t{std::numeric_limits<int32_t>::max()} - 1 : std::numeric_limits<int64_t>::max();
}

void set_most_counted(int64_t most) { set_to = most; }

}  // namespace flatcore
