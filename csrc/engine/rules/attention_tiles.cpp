#include "attention_tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

namespace flatcore {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a tile over its heads: five such in float32 are 10 MiB, within one core's share of a last-level
// cache. With fewer rows the products spend their time packing the keys; with more, causal tiles compute
// more that the mask then hides.
constexpr int64_t kTileElements = 1 << 19;
constexpr int64_t kLeastRows = 64, kMostRows = 128;

// On a GPU a tile is one launch of each product and row pass: the buffers, 128 MiB each in float32, bound how
// few they are. A causal sweep over 256 rows at a time computes an eighth too much where there are 1,024.
// Chosen by counting, not measured.
constexpr int64_t kGpuTileElements = int64_t{1} << 25;
constexpr int64_t kGpuCausalRows = 256;

}  // namespace

AttentionTiling::AttentionTiling(int64_t batches, int64_t heads, int64_t queries, int64_t keys, bool causal,
                                 bool gpu)
    : batches_(batches), heads_(heads), queries_(queries),
      seen_keys_(causal ? std::min(queries, keys) : keys),
      most_elements_(gpu ? kGpuTileElements : kTileElements), causal_(causal), gpu_(gpu) {
    const int64_t most_rows = !gpu ? kMostRows : causal ? kGpuCausalRows : std::max(kLeastRows, queries);
    const int64_t most = std::clamp(most_elements_ / std::max<int64_t>(1, seen_keys_), kLeastRows, most_rows);
    const int64_t pieces = std::max<int64_t>(1, ceil_div(queries, most));
    tile_rows_ = ceil_div(queries, pieces);
}

int64_t AttentionTiling::threads() const { return gpu_ ? 1 : at::get_num_threads(); }

int64_t AttentionTiling::group_size() const {
    if (!gpu_ && tile_rows_ < queries_) return 1;
    const int64_t fitting = most_elements_ / std::max<int64_t>(1, tile_elements());
    const int64_t per_thread = ceil_div(batches_ * heads_, threads());
    return std::max<int64_t>(1, std::min(fitting, per_thread));
}

std::vector<AttentionUnit> AttentionTiling::units(int64_t directions) const {
    std::vector<HeadGroup> groups;
    const int64_t size = group_size();
    if (size >= heads_) {
        const int64_t entries = size / std::max<int64_t>(1, heads_);
        for (int64_t b = 0; b < batches_; b += entries)
            groups.push_back({b, std::min(entries, batches_ - b), 0, heads_});
    } else {
        const int64_t each = ceil_div(heads_, ceil_div(heads_, size));
        for (int64_t b = 0; b < batches_; ++b)
            for (int64_t h = 0; h < heads_; h += each)
                groups.push_back({b, 1, h, std::min(each, heads_ - h)});
    }
    // Few groups that do not divide among the threads: divide the directions too, though each range of them
    // then recomputes the probabilities.
    const int64_t count = static_cast<int64_t>(groups.size());
    const int64_t ranges = count >= 4 * threads() ? 1 : threads() / std::gcd(count, threads());
    const int64_t range = std::max<int64_t>(1, ceil_div(directions, ranges));
    std::vector<AttentionUnit> units;
    for (const HeadGroup& group : groups)
        for (int64_t first = 0; first < directions; first += range)
            units.push_back({group, first, std::min(range, directions - first)});
    return units;
}

std::vector<AttentionTile> AttentionTiling::tiles() const {
    std::vector<AttentionTile> tiles;
    for (int64_t row = 0; row < queries_; row += tile_rows_) {
        const int64_t end = std::min(queries_, row + tile_rows_);
        // A causal row i sees the keys up to i.
        tiles.push_back({row, end - row, causal_ ? std::min(seen_keys_, end) : seen_keys_});
    }
    return tiles;
}

at::Tensor group_part(const at::Tensor& t, const HeadGroup& group) {
    return t.narrow(-4, group.batch, group.batches).narrow(-3, group.head, group.heads).flatten(-4, -3);
}

}  // namespace flatcore
