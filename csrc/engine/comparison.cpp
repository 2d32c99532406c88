#include "comparison.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "engine/on_device.h"
#include "kernels/same_bytes.h"

namespace flatcore {
namespace {

// Numbers in memory that this process, or a kernel, may read by their address.
bool readable(const at::Tensor& t) {
    return t.layout() == at::kStrided && t.has_storage() && (t.is_cpu() || on_gpu(t)) && !t.is_neg() &&
           !t.is_conj() && !t.key_set().has(c10::DispatchKey::Python) &&
           (t.numel() == 0 || t.const_data_ptr());
}

// Same places of the same elements, without gaps: equal where their bytes are.
bool lie_alike(const at::Tensor& a, const at::Tensor& b) {
    return (a.is_contiguous() && b.is_contiguous()) ||
           (a.strides() == b.strides() && a.is_non_overlapping_and_dense());
}

}  // namespace

Comparison::Comparison(const std::vector<at::Tensor>& before, const std::vector<at::Tensor>& now) {
    TORCH_CHECK_VALUE(before.size() == now.size(), "now: expected as many tensors as before");
    std::vector<Pair> bytes;
    for (size_t i = 0; i < before.size() && equal_; ++i) {
        const at::Tensor &a = before[i], &b = now[i];
        const bool together = a.device() == before[0].device() && readable(a) && readable(b);
        if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type() || a.device() != b.device())
            equal_ = false;
        else if (together && lie_alike(a, b))
            bytes.emplace_back(a, b);
        else if (together && !a.is_cpu() && a.is_contiguous())  // a copy, rather than to wait for each
            bytes.emplace_back(a, b.contiguous());
        else
            equal_ = at::equal(a, b);
    }
    if (!equal_ || bytes.empty()) return;
    try {
        start(bytes);
    } catch (...) {
        abandon();
        throw;
    }
}

Comparison::~Comparison() {
    try {
        wait();
    } catch (const std::exception&) {
        abandon();
    }
}

// After an error of the device a kernel may still write there: that memory stays for ever.
void Comparison::abandon() { new at::Tensor(std::move(different_)); }

void Comparison::start(const std::vector<Pair>& pairs) {
    const at::Tensor& like = pairs[0].first;
    const bool away = !like.is_cpu();
    different_ = at::zeros({1}, at::TensorOptions(at::kInt).pinned_memory(away));
    int* different = different_.mutable_data_ptr<int>();
    PairsOfArrays arrays;
    const auto launch = [&] { FLATCORE_RUN(like, find_difference, arrays, different); };
    for (const auto& [a, b] : pairs) {
        arrays.pairs[arrays.count++] = {static_cast<const unsigned char*>(a.const_data_ptr()),
                                        static_cast<const unsigned char*>(b.const_data_ptr()),
                                        static_cast<int64_t>(b.nbytes())};
        if (arrays.count == kPairsAtOnce) {
            launch();
            arrays.count = 0;
        }
    }
    launch();
    if (!away) return;
    const c10::DeviceGuard guard(like.device());
    done_.emplace(like.device().type());
    done_->record(c10::impl::VirtualGuardImpl(like.device().type()).getStream(like.device()));
}

// The memory that the device writes to must stay until then.
void Comparison::wait() {
    if (!done_) return;
    const c10::Event done = std::move(*done_);
    done_.reset();
    done.synchronize();
}

bool Comparison::equal() {
    wait();
    if (different_.defined()) equal_ = equal_ && *different_.const_data_ptr<int>() == 0;
    return equal_;
}

}  // namespace flatcore
