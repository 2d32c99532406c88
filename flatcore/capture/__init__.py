"""Capture: a torch model and its loss become a program of a small vocabulary."""

from flatcore.errors import NotSeparable as NotSeparable

from .batch import batch_leaves, flatten_batch, split_batch
from .cut import NO_VALUE
from .export import capture, depends_on_values
from .interpreter import cut_values, interpret
from .prelude import Prelude, named_tensors
from .probed import ProbedProgram, probe
from .program import Op, Program, Value
from .trial import NOT_DERIVATIVE
from .verify import VerificationError, verify

__all__ = [
    "NOT_DERIVATIVE",
    "NO_VALUE",
    "Op",
    "Prelude",
    "ProbedProgram",
    "Program",
    "Value",
    "VerificationError",
    "batch_leaves",
    "capture",
    "cut_values",
    "depends_on_values",
    "flatten_batch",
    "interpret",
    "named_tensors",
    "probe",
    "split_batch",
    "verify",
]
