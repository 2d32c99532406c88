// Memory for the tensors of a product, kept between products.
//
// A large buffer is pages that the system fills with zeros when they are first touched, and takes back when
// it is freed; on small images that was a third of a product (docs/performance.md). While a Workspace is
// entered, what torch allocates on its thread, rules and library functions alike, comes from chunks that
// stay.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace flatcore {

class Workspace {
 public:
    Workspace();
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
};

// Whoever will compute further products holds one. With the last one the chunks go back to the system.
class WorkspaceUser {
 public:
    WorkspaceUser();
    ~WorkspaceUser();
    WorkspaceUser(const WorkspaceUser&) = delete;
    WorkspaceUser& operator=(const WorkspaceUser&) = delete;
};

// A matrix (K, P) for directions or products, which leave a product; not written yet, and never an inference
// tensor. A large one on the CPU lies on large pages, one fault for 512. While there is a WorkspaceUser its
// memory is kept when it is freed, two matrices and `most` bytes at most, for the next one of about its size.
at::Tensor fresh_rows(int64_t K, int64_t P, const at::TensorOptions& options, int64_t most);

// Bytes that are kept for the next of them.
int64_t spare_bytes();

// Bytes of all chunks.
int64_t workspace_bytes();

}  // namespace flatcore
