#include "row_sums.h"

#include <ATen/ops/empty.h>

#include "engine/on_device.h"
#include "engine/tensor_ops.h"
#include "kernels/piece_sums.h"

namespace flatcore {

namespace {

// The accumulator of an input, or memory in its place where its elements do not follow each other.
class Target {
 public:
    Target(Directions& d, const RowSums& sums) : pieces_(sums.pieces) {
        if (!pieces_.defined()) return;
        target_ = d.accumulator(sums.input);
        const at::Tensor& buffer = target_.buffer;
        const bool dense = d.K() == 0 || buffer.select(0, 0).is_contiguous();
        result_ = dense ? buffer : at::empty(buffer.sizes(), buffer.options());
    }
    bool defined() const { return pieces_.defined(); }
    const at::Tensor& result() const { return result_; }
    template <class T>
    PieceSums<T> kernel() const {
        if (!defined()) return {};
        return {pieces_.const_data_ptr<double>(), result_.mutable_data_ptr<T>(), result_.stride(0),
                in_place() && !target_.fresh};
    }
    void finish() const {
        if (!defined() || in_place()) return;
        target_.fresh ? target_.buffer.copy_(result_) : target_.buffer.add_(result_);
    }

 private:
    bool in_place() const { return result_.is_same(target_.buffer); }

    at::Tensor pieces_, result_;
    Accumulator target_{};
};

}  // namespace

void add_row_sums(Directions& d, const RowSums& first, const RowSums& second) {
    if (!first.pieces.defined() && !second.pieces.defined()) return;
    const Target one(d, first), two(d, second);
    const at::Tensor& some = one.defined() ? one.result() : two.result();
    const at::Tensor& pieces = one.defined() ? first.pieces : second.pieces;
    FLATCORE_DISPATCH(some, "row_sums", [&] {
        FLATCORE_RUN(some, add_pieces<scalar_t>, d.K(), pieces.size(2), one.kernel<scalar_t>(),
                     two.kernel<scalar_t>());
    });
    one.finish();
    two.finish();
}

}  // namespace flatcore
