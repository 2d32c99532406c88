"""The microbenchmark: curvature-vector products by flatcore, by bare torch and by the other packages installed."""

from flatcore.bench.ceilings import Ceilings, measure
from flatcore.bench.compare import Comparison, Prepared, Timing, compare, prepared
from flatcore.bench.setting import Setting
from flatcore.bench.workloads import WORKLOADS, Workload

__all__ = [
    "WORKLOADS",
    "Ceilings",
    "Comparison",
    "Prepared",
    "Setting",
    "Timing",
    "Workload",
    "compare",
    "measure",
    "prepared",
]
