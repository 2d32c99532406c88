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

// Asks the system to back `fresh`, not written yet, by large pages: one fault for 512. For results, which
// leave.
void use_large_pages(const at::Tensor& fresh);

// Bytes of all chunks.
int64_t workspace_bytes();

}  // namespace flatcore
