// Whether tensors are still equal to copies of them, found while a GPU goes on to other work.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>
#include <utility>
#include <vector>

namespace flatcore {

// Pair by pair; what differs in shape, dtype or device is different. Numbers are compared by their bytes, so
// -0 differs from 0; where two tensors do not lie alike in memory, by torch. On a GPU it is begun on the
// current stream and waited for when asked.
class Comparison {
 public:
    Comparison(const std::vector<at::Tensor>& before, const std::vector<at::Tensor>& now);
    ~Comparison();
    Comparison(const Comparison&) = delete;
    Comparison& operator=(const Comparison&) = delete;

    // Are all pairs equal? Waits for the comparison, not for what was begun after it.
    bool equal();

 private:
    using Pair = std::pair<at::Tensor, at::Tensor>;
    void start(const std::vector<Pair>& pairs);
    void wait();
    void abandon();

    bool equal_ = true;
    at::Tensor different_;  // one int on the host, which the device writes to
    std::optional<c10::Event> done_;
};

}  // namespace flatcore
