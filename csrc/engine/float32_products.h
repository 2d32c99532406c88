// How cuBLAS and cuDNN multiply float32 while a product runs on a GPU: as its `precision` says, whatever
// torch is set to, since torch lets convolutions round to TF32 unless told otherwise.
#pragma once

#include <ATen/Context.h>

#include <mutex>
#include <optional>

#include "program.h"

namespace flatcore {

// torch's settings belong to the process, so products of several threads are started one after another, and
// work that another thread starts meanwhile may be rounded as this product asks. On the CPU nothing changes.
class Float32Products {
 public:
    Float32Products(const at::Device& device, Precision precision);
    ~Float32Products();
    Float32Products(const Float32Products&) = delete;
    Float32Products& operator=(const Float32Products&) = delete;

 private:
    std::unique_lock<std::recursive_mutex> lock_;
    std::optional<at::NoTF32Guard> exact_;
    bool matrices_set_ = false, convolutions_set_ = false, rounds_ = false;
};

}  // namespace flatcore
