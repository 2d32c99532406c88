// How attention is cut: units of work for the threads, each a group of heads times a range of directions, and
// within a unit tiles of query rows times the keys those rows may see. A GPU works at one unit at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace flatcore {

// `heads` heads of each of `batches` batch entries. Whole entries or heads of one: consecutive in the
// flattened (batch, heads) axes either way.
struct HeadGroup {
    int64_t batch, batches, head, heads;
    int64_t size() const { return batches * heads; }
};

struct AttentionUnit {
    HeadGroup group;
    int64_t direction, directions;
};

struct AttentionTile {
    int64_t row, rows, keys;  // the keys from the first on
};

class AttentionTiling {
 public:
    AttentionTiling() = default;
    AttentionTiling(int64_t batches, int64_t heads, int64_t queries, int64_t keys, bool causal, bool gpu);

    // No two units write the same memory. The cut depends on the number of threads, and on nothing else that
    // changes between calls. The first unit is the largest.
    std::vector<AttentionUnit> units(int64_t directions) const;
    std::vector<AttentionTile> tiles() const;

    int64_t seen_keys() const { return seen_keys_; }                   // by the last row
    int64_t tile_elements() const { return tile_rows_ * seen_keys_; }  // of the largest tile, per head

 private:
    int64_t group_size() const;  // heads of the largest group, at most
    int64_t threads() const;

    int64_t batches_ = 0, heads_ = 0, queries_ = 0, seen_keys_ = 0, tile_rows_ = 0;
    int64_t most_elements_ = 0;  // of a tile over its heads
    bool causal_ = false, gpu_ = false;
};

// The group's part of t (..., batch, heads, length, width) as (..., heads, length, width): a view where the
// leading axes of t are contiguous.
at::Tensor group_part(const at::Tensor& t, const HeadGroup& group);

}  // namespace flatcore
