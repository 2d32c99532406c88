// How cuBLAS and cuDNN multiply float32 while a product runs on a GPU: as its `precision` says, whatever
// torch is set to, since torch lets convolutions round to TF32 unless told otherwise.
#pragma once

#include <ATen/Context.h>

#include <mutex>
#include <string>

#include "program.h"

namespace flatcore {

// torch's settings belong to the process (its guard for one thread, NoTF32Guard, is not asked by cuBLASLt,
// nor by autograd's threads). So products of several threads are started one after another, and work that
// another thread starts meanwhile may be rounded as this product asks. They are put back to the same values;
// what followed torch's default is set explicitly from then on, as torch has no way to unset it. On the CPU
// nothing changes.
class Float32Products {
 public:
    Float32Products(const at::Device& device, Precision precision);
    ~Float32Products();
    Float32Products(const Float32Products&) = delete;
    Float32Products& operator=(const Float32Products&) = delete;

 private:
    std::unique_lock<std::recursive_mutex> lock_;
    bool set_matrices_ = false, set_convolutions_ = false, rounds_ = false;
    std::string name_;  // of the old setting of matrix products
    at::Float32Precision matrices_{}, convolutions_{}, recurrent_{};
};

}  // namespace flatcore
