// Small matrices between the host, where the small algebra of the Krylov methods is done, and the vectors'
// device.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../krylov/matrix.h"

namespace flatcore {

// Onto a device it goes from pinned memory, so that nobody waits for it.
at::Tensor to_tensor(const krylov::Matrix& B, const at::TensorOptions& options);

// All of them in one transfer, which waits for what was launched before it.
std::vector<krylov::Matrix> fetch(const std::vector<at::Tensor>& matrices);
inline krylov::Matrix to_matrix(const at::Tensor& B) { return fetch({B})[0]; }

// How often this process has fetched, from whatever device: what a step may cost is tested by it.
int64_t fetches();

}  // namespace flatcore
