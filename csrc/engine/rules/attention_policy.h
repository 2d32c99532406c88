// Which way attention takes on a GPU.
#pragma once

#include <string>

namespace flatcore {

enum class AttentionPolicy { choose, tiles, fused };

// "choose", or one way for all that it supports: "tiles" (cuBLAS and row kernels), "fused". Throws
// std::invalid_argument for any other. For states made from now on.
void set_attention_policy(const std::string& policy);

}  // namespace flatcore
