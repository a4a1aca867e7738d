"""The choice under a budget: units, the exact knapsack, the Pareto set, configurations worth trying."""

from quantdm.allocation.select import pareto, select, select_lambda

__all__ = ["pareto", "select", "select_lambda"]
