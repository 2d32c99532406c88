#include "random_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "../engine/on_device.h"
#include "../kernels/probes.h"

namespace flatcore {

at::Tensor sign_rows(uint64_t seed, int64_t first, int64_t n, int64_t P, const at::TensorOptions& options) {
    const at::Tensor rows = at::empty({n, P}, options);
    AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "sign_rows", [&] {
        FLATCORE_RUN(rows, rademacher_rows<scalar_t>, seed, first, n, P, rows.mutable_data_ptr<scalar_t>());
    });
    return rows;
}

at::Tensor gaussian_rows(uint64_t seed, int64_t first, int64_t n, int64_t P,
                         const at::TensorOptions& options) {
    const at::Tensor rows = at::empty({n, P}, options);
    AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "gaussian_rows", [&] {
        FLATCORE_RUN(rows, normal_rows<scalar_t>, seed, first, n, P, rows.mutable_data_ptr<scalar_t>());
    });
    return rows;
}

}  // namespace flatcore
