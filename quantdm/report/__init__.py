"""The report: reads a run directory, draws and writes one HTML file; computes nothing beyond aggregation."""

from quantdm.report.page import write_report

__all__ = ["write_report"]
