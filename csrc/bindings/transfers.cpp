#include "transfers.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

namespace flatcore {
namespace {

std::atomic<int64_t> fetched{0};

}  // namespace

int64_t fetches() { return fetched; }

at::Tensor to_tensor(const krylov::Matrix& B, const at::TensorOptions& options) {
    // Converted here: a copy that converts as well goes through memory that is not pinned.
    const bool away = !options.device().is_cpu();
    at::Tensor host = at::empty({B.rows, B.cols}, options.device(at::kCPU).pinned_memory(away));
    AT_DISPATCH_FLOATING_TYPES(host.scalar_type(), "to_tensor", [&] {
        std::transform(B.data.begin(), B.data.end(), host.mutable_data_ptr<scalar_t>(),
                       [](double x) { return static_cast<scalar_t>(x); });
    });
    return away ? host.to(options.device(), host.scalar_type(), /*non_blocking=*/true) : host;
}

std::vector<krylov::Matrix> fetch(const std::vector<at::Tensor>& matrices) {
    std::vector<at::Tensor> flat;
    for (const at::Tensor& B : matrices) flat.push_back(B.to(at::kDouble).reshape({-1}));
    if (flat.empty()) return {};
    ++fetched;
    const at::Tensor all = (flat.size() == 1 ? flat[0] : at::cat(flat)).cpu();
    const double* next = all.const_data_ptr<double>();
    std::vector<krylov::Matrix> result;
    for (const at::Tensor& B : matrices) {
        result.emplace_back(B.size(0), B.size(1));
        std::copy_n(next, B.numel(), result.back().data.begin());
        next += B.numel();
    }
    return result;
}

}  // namespace flatcore
