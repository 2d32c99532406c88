"""A flatness report: everything measured once, as a table, a page and JSON."""

from flatcore.report.compute import Comparison, Curvature, Report, compare, report

__all__ = ["Comparison", "Curvature", "Report", "compare", "report"]
