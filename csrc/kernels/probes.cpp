#include "probes.h"

#include <algorithm>

#include "parallel.h"
#include "probes.inl"

namespace flatcore {
namespace {

constexpr int64_t kWordsPerPiece = 1024;  // fewer are not worth a thread

}  // namespace

template <class T>
void rademacher_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out) {
    const int64_t words = (P + 63) / 64;  // one word gives 64 signs
    parallel_for(0, K * words, kWordsPerPiece, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / words, index = i % words;
            const uint64_t bits = word(row_key(seed, Stream::signs, first + row), index);
            T* target = out + row * P + index * 64;
            const int64_t count = std::min<int64_t>(64, P - index * 64);
            for (int64_t j = 0; j < count; ++j) target[j] = body::rademacher_sign<T>(bits, j);
        }
    });
}

template <class T>
void normal_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out) {
    const int64_t pairs = (P + 1) / 2;
    parallel_for(0, K * pairs, kWordsPerPiece, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / pairs, pair = i % pairs;
            const uint64_t key = row_key(seed, Stream::normals, first + row);
            const auto [even, odd] = body::normal_pair(key, pair);
            T* target = out + row * P + 2 * pair;
            target[0] = static_cast<T>(even);
            if (2 * pair + 1 < P) target[1] = static_cast<T>(odd);
        }
    });
}

template void rademacher_rows<float>(uint64_t, int64_t, int64_t, int64_t, float*);
template void rademacher_rows<double>(uint64_t, int64_t, int64_t, int64_t, double*);
template void normal_rows<float>(uint64_t, int64_t, int64_t, int64_t, float*);
template void normal_rows<double>(uint64_t, int64_t, int64_t, int64_t, double*);

}  // namespace flatcore
