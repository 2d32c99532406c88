"""Prints C++ for every function of CUDA that torch's libraries want and the given object files have not.

    stubs.py TORCH/lib OBJECT...

Of the runtime and the driver such a function is a complaint, and refuses. Of cuBLAS and cuSOLVER it succeeds and does
nothing, as kernels do; one that is asked for the size of a workspace would leave it open, which is a complaint.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WANTED = re.compile(r"(__cuda|cuda[A-Z]|cu(?!File)[A-Z]|cublas|cusolver)\w*")
# Without CUDA's headers, which declare the functions with their arguments.
HEAD = """#include <string>
namespace simulated {
void complain(const std::string& what);
}
#define SIMULATED extern "C" __attribute__((visibility("default")))
"""
NOT_SUPPORTED = 801  # cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED


def symbols(which: str, *files: str | Path) -> set[str]:
    """Names as nm prints them, without the version of their library."""
    command = ["nm", "-P", *(["-D"] if which == "--undefined-only" else []), which, *files]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {re.split("[ @]", line)[0] for line in listing.splitlines()}


def stub(name: str) -> str:
    complaint = f'simulated::complain("{name} is not simulated"); '
    if not name.startswith(("cublas", "cusolver")):
        return f"SIMULATED int {name}() {{ {complaint}return {NOT_SUPPORTED}; }}"
    if "Create" in name:
        return f"SIMULATED int {name}(void** out) {{ static long thing[8]; *out = thing; return 0; }}"
    return f"SIMULATED int {name}() {{ {complaint if 'bufferSize' in name else ''}return 0; }}"


def main(torch: str, *objects: str) -> None:
    wanted = symbols("--undefined-only", *Path(torch).glob("lib*.so"))
    missing = {name for name in wanted if WANTED.fullmatch(name)} - symbols("--defined-only", *objects)
    print(HEAD, *map(stub, sorted(missing)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
