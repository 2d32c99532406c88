// same_bytes.cu, emulated, and the CPU's: one changed byte at a time.
#include "kernels/same_bytes.h"

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

bool found(const PairsOfArrays& arrays, int before) {
    std::vector<int> different{before}, there{before};
    find_difference(arrays, different.data());
    cuda::find_difference(arrays, there.data(), nullptr);
    EXPECT(different == there);
    return different[0] != 0;
}

// Arrays of these lengths that begin `first` and `second` bytes behind an aligned address.
void test_lengths(const std::vector<int64_t>& lengths, int64_t first, int64_t second) {
    constexpr int64_t kGap = 5;  // bytes before and behind, which do not count
    std::vector<std::vector<unsigned char>> one, two;
    PairsOfArrays arrays;
    for (const int64_t n : lengths) {
        one.emplace_back(static_cast<size_t>(first + n + kGap), 7);
        two.emplace_back(static_cast<size_t>(second + n + kGap), 9);
    }
    for (size_t p = 0; p < lengths.size(); ++p) {
        unsigned char* a = one[p].data() + first;
        unsigned char* b = two[p].data() + second;
        for (int64_t i = 0; i < lengths[p]; ++i) a[i] = b[i] = static_cast<unsigned char>(i * 31 + 1);
        arrays.pairs[arrays.count++] = {a, b, lengths[p]};
    }
    EXPECT(!found(arrays, 0));
    EXPECT(found(arrays, 1));
    for (size_t p = 0; p < lengths.size(); ++p)
        for (int64_t i = 0; i < lengths[p]; i += i < 20 || i > lengths[p] - 20 ? 1 : 397) {
            unsigned char& byte = (i % 2 ? one[p].data() + first : two[p].data() + second)[i];
            byte ^= static_cast<unsigned char>(1 << i % 8);
            EXPECT(found(arrays, 0));
            byte ^= static_cast<unsigned char>(1 << i % 8);
        }
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_lengths({}, 0, 0);
        test_lengths({0}, 0, 0);
        test_lengths({0, 3, 0, 16, 1, 15, 17}, 0, 0);
        for (const int64_t offset : {0, 1, 4, 16}) {
            test_lengths({70}, offset, 0);
            test_lengths({70}, offset, offset);
        }
        test_lengths({2000, 12, 5001}, 0, 0);
    }
    test_lengths(std::vector<int64_t>(static_cast<size_t>(kPairsAtOnce), 1), 0, 0);
    // More than a wave of blocks: every thread goes round again.
    const int64_t long_one = (int64_t{1} << 22) + 5 * 16 + 3;
    std::vector<unsigned char> a(static_cast<size_t>(long_one), 3), b = a;
    PairsOfArrays arrays;
    arrays.pairs[arrays.count++] = {a.data(), b.data(), long_one};
    EXPECT(!found(arrays, 0));
    a.back() = 4;
    EXPECT(found(arrays, 0));
    return failures != 0;
}
