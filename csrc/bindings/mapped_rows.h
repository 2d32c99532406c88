// Rows in a mapped file: a basis, and room for a few blocks besides.
#pragma once

#include <ATen/core/Tensor.h>

namespace flatcore {

class MappedRows {
 public:
    MappedRows() = default;

    // `all` (n, P) maps a file, shared with it; the rows from `first` on are free for blocks.
    MappedRows(at::Tensor all, int64_t first) : all_(std::move(all)), first_(first) {}

    bool holds(const at::Tensor& X) const { return all_.defined() && X.is_alias_of(all_); }

    // Where X lies in the file, its pages leave the process; the system writes them to the file when it
    // likes, and whoever touches them next gets them back, with others around them: after a walk in
    // panels the whole should rest. Elsewhere nothing happens.
    void rest(const at::Tensor& X) const;

    // n rows for the first or the second of two blocks, undefined where there is no room for two such blocks.
    at::Tensor block(int64_t which, int64_t n) const;

 private:
    at::Tensor all_;
    int64_t first_ = 0;
};

}  // namespace flatcore
