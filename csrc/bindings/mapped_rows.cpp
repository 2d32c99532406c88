#include "mapped_rows.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace flatcore {

void MappedRows::rest(const at::Tensor& X) const {
    if (X.numel() == 0 || !holds(X)) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    for (int64_t i = 0; i < X.size(0); ++i) {
        const at::Tensor row = X.select(0, i);
        const auto begin = reinterpret_cast<uintptr_t>(row.const_data_ptr());
        const uintptr_t end = begin + row.nbytes();
        // Whole pages, also where others lie on them: nothing is lost by it.
        const uintptr_t first = begin / page * page;
        madvise(reinterpret_cast<void*>(first), (end + page - 1) / page * page - first, MADV_DONTNEED);
    }
}

at::Tensor MappedRows::block(int64_t which, int64_t n) const {
    if (!all_.defined() || first_ + 2 * n > all_.size(0)) return {};
    return all_.narrow(0, first_ + which * n, n);
}

}  // namespace flatcore
