"""The report: reads run directories, draws and writes one HTML file; computes nothing beyond aggregation."""

from quantdm.report.comparison import write_comparison
from quantdm.report.page import write_report

__all__ = ["write_comparison", "write_report"]
