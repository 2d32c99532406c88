#include "contiguous_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "workspace.h"

namespace flatcore {
namespace {

// Columns at a time, which are read K times and so must stay in a cache.
constexpr int64_t kPiece = 1024;

}  // namespace

at::Tensor contiguous_rows(const at::Tensor& rows, int64_t most) {
    // torch negates views lazily; what lies in memory is then the negative of what they show.
    if (!rows.is_cpu() || rows.is_neg()) return rows.resolve_neg().contiguous();
    const int64_t K = rows.size(0), P = rows.size(1), row = rows.stride(0), column = rows.stride(1);
    const at::Tensor copy = fresh_rows(K, P, rows.options(), most);
    AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "contiguous_rows", [&] {
        const scalar_t* from = rows.const_data_ptr<scalar_t>();
        scalar_t* to = copy.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, P, kPiece, [&](int64_t begin, int64_t end) {
            for (int64_t first = begin; first < end; first += kPiece) {
                const int64_t last = std::min(first + kPiece, end);
                for (int64_t k = 0; k < K; ++k)
                    for (int64_t p = first; p < last; ++p) to[k * P + p] = from[k * row + p * column];
            }
        });
    });
    return copy;
}

}  // namespace flatcore
