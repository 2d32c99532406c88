"""The microbenchmark: curvature-vector products by flatcore, by bare torch and by the other packages installed."""

from flatcore.bench.ceilings import Ceilings, measure
from flatcore.bench.compare import Comparison, Timing, compare
from flatcore.bench.setting import Setting
from flatcore.bench.workloads import WORKLOADS, Workload

__all__ = ["WORKLOADS", "Ceilings", "Comparison", "Setting", "Timing", "Workload", "compare", "measure"]
