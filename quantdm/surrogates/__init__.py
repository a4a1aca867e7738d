"""Surrogates that learn image quality from configurations, their explanation, and the choice under a budget."""

from quantdm.surrogates.additive import AdditiveSurrogate, RidgeSurrogate
from quantdm.surrogates.attribution import Attribution, attribute
from quantdm.surrogates.block_scores import score_blocks
from quantdm.surrogates.graph_surrogate import GraphSurrogate
from quantdm.surrogates.selection import pareto, select
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.tree import TreeSurrogate

__all__ = [
    "AdditiveSurrogate",
    "Attribution",
    "GraphSurrogate",
    "RidgeSurrogate",
    "SearchSpace",
    "TreeSurrogate",
    "attribute",
    "pareto",
    "score_blocks",
    "select",
]
