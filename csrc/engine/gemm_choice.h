// Which library multiplies float32 matrices: BLAS (what torch uses) or oneDNN, measured once per class of
// shapes. Neither is always ahead: see docs/performance.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>

namespace flatcore {

// A batch of products (m, k) (k, n), sizes rounded to powers of two, operands read transposed or not, with a
// number of threads: products of one class go to one library, so that results repeat bit for bit.
struct GemmClass {
    int64_t batch, m, n, k;
    bool transposed_a, transposed_b;
    int threads;
    auto operator<=>(const GemmClass&) const = default;
    std::string name() const;
    static GemmClass named(const std::string& name);
};

// c = a b, or c += a b; matrices, or batches of them. c must not overlap itself.
void multiply(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate);

// Does torch's oneDNN take float32 on this processor? Else BLAS multiplies, whatever the policy.
bool onednn_multiplies();

// "measure", or one library for all: "blas", "onednn". Throws std::invalid_argument for any other.
void set_gemm_policy(const std::string& policy);

// What has been measured or set: name of a class -> true for oneDNN.
std::map<std::string, bool> gemm_choices();
void set_gemm_choices(const std::map<std::string, bool>& choices);

}  // namespace flatcore
