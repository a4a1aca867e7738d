"""Surrogates that learn image quality from configurations, and their explanation."""

from quantdm.surrogates.additive import AdditiveSurrogate
from quantdm.surrogates.attribution import Attribution, attribute
from quantdm.surrogates.block_scores import BlockScores, score_blocks
from quantdm.surrogates.comparison import agreement, agreement_with_truth
from quantdm.surrogates.explainers import explain_by_shapley, explain_by_swaps
from quantdm.surrogates.graph_surrogate import GraphSurrogate
from quantdm.surrogates.local import LocalExplanation, explain_one
from quantdm.surrogates.ridge import RidgeSurrogate
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.tree import TreeSurrogate

__all__ = [
    "AdditiveSurrogate",
    "Attribution",
    "BlockScores",
    "GraphSurrogate",
    "LocalExplanation",
    "RidgeSurrogate",
    "SearchSpace",
    "TreeSurrogate",
    "agreement",
    "agreement_with_truth",
    "attribute",
    "explain_by_shapley",
    "explain_by_swaps",
    "explain_one",
    "score_blocks",
]
