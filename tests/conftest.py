"""Settings for all tests."""

import os

# A measured choice between libraries would make the last digits differ from run to run.
os.environ.setdefault("FLATCORE_GEMM", "blas")

import torch

# The cases are tiny: a second thread costs more than it saves, most of all where the machine is shared. Tests of
# threads set their number themselves.
torch.set_num_threads(1)
