"""What the build writes into `_build.py`: versions of the torch, the compiler and the CUDA it was made with."""

TORCH_VERSION: str
COMPILER: str
CUDA: str
