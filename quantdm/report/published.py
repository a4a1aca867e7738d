"""How a run's findings compare with those published of its kind of architecture (Qua2SeDiMo, arXiv 2412.14628)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdm.report.advice import read_names
from quantdm.report.insights import width_value, widths
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.roles import role_of

Floats = NDArray[np.float64]
ATTENTION = ("q", "k", "v", "out")


@dataclass(frozen=True)
class Comparison:
    """One published finding that this architecture can show, and what this run found: `agrees`, and its figures."""

    published: str
    agrees: bool
    found: str


def compare_published(space: SearchSpace, values: Floats) -> list[Comparison]:
    """Return the published findings that concern this architecture, held against an explanation's values [L, O]."""
    roles = np.array([role_of(layer) for layer in space.layers])
    worth = width_value(space, values)
    checks: tuple[Callable[[SearchSpace, Floats, NDArray[np.str_], Floats], Comparison | None], ...] = (
        _method,
        _res_blocks,
        _final,
        _time,
        _queries,
    )
    found = [check(space, values, roles, worth) for check in checks]
    return [item for item in found if item is not None]


def say_published(space: SearchSpace, values: Floats) -> str | None:
    """Return the comparison as one sentence; None where nothing was published of such an architecture."""
    found = compare_published(space, values)
    if not found:
        return None
    apart = [item for item in found if not item.agrees]
    text = f"Published insights: this run agrees with {len(found) - len(apart)} of {len(found)} for such architectures"
    if apart:
        text += "; otherwise than published, " + "; ".join(
            f"{item.found} (published: {item.published})" for item in apart
        )
    return f"{text}."


def _is_unet(roles: NDArray[np.str_]) -> bool:
    return bool(np.isin(roles, ["conv1", "conv2"]).any())


def _method(space: SearchSpace, values: Floats, roles: NDArray[np.str_], _: Floats) -> Comparison | None:
    by_kind: dict[str, list[float]] = {"uniform": [], "kmeans": []}
    for name, value in read_names(space, values).methods.items():
        by_kind.setdefault(name.split("-")[0], []).append(value)
    if not by_kind["uniform"] or not by_kind["kmeans"]:
        return None
    uniform, kmeans = (max(by_kind[kind]) for kind in ("uniform", "kmeans"))
    unet = _is_unet(roles)
    return Comparison(
        "U-Nets favour uniform quantization" if unet else "transformers lean to k-means",
        (uniform > kmeans) == unet,
        f"the best k-means method is worth {kmeans - uniform:+.3f} of y more than the best uniform one",
    )


def _res_blocks(space: SearchSpace, _: Floats, roles: NDArray[np.str_], worth: Floats) -> Comparison | None:
    if not _is_unet(roles):
        return None
    return _heavier(
        worth,
        np.isin(roles, ["conv1", "conv2", "shortcut", "time-proj"]),
        _attention(roles),
        "ResBlocks are far more sensitive than attention",
        ("a layer of a ResBlock", "one of attention"),
        _span(space),
    )


def _final(space: SearchSpace, _: Floats, roles: NDArray[np.str_], worth: Floats) -> Comparison | None:
    if _is_unet(roles) or not (roles == "text-MLP").any():  # said of text-to-image transformers
        return None
    final = roles == "final"
    said, of = "the final projection matters", ("the final projection", "the mean layer")
    return _heavier(worth, final, ~final, said, of, _span(space))


def _time(space: SearchSpace, _: Floats, roles: NDArray[np.str_], worth: Floats) -> Comparison | None:
    said = "the time embedding matters more than the caption embedding"
    of = ("a layer of the time embedding", "one of the caption embedding")
    return _heavier(worth, roles == "time-MLP", roles == "text-MLP", said, of, _span(space))


def _queries(space: SearchSpace, _: Floats, roles: NDArray[np.str_], worth: Floats) -> Comparison | None:
    queries, others = _attention(roles, ("q",)), _attention(roles, ("k", "v", "out"))
    others |= np.isin(roles, ["ff-up", "ff-down"])
    said, of = "query projections go to few bits most readily", ("another projection", "a query projection")
    return _heavier(worth, others, queries, said, of, _span(space))


def _attention(roles: NDArray[np.str_], which: tuple[str, ...] = ATTENTION) -> NDArray[np.bool_]:
    return np.array([role.split(" ")[-1] in which and " " in role for role in roles])


def _span(space: SearchSpace) -> str:
    return f"{widths(space)[-1]} instead of {widths(space)[0]} bits"


def _heavier(
    worth: Floats,
    heavy: NDArray[np.bool_],
    light: NDArray[np.bool_],
    published: str,
    of: tuple[str, str],
    span: str,
) -> Comparison | None:
    """Compare what bits are worth to two groups of layers; the first is the more sensitive one by the publication."""
    if not heavy.any() or not light.any():
        return None
    own, other = float(worth[heavy].mean()), float(worth[light].mean())
    return Comparison(published, own > other, f"{span} are worth {own:.3f} of y to {of[0]}, {other:.3f} to {of[1]}")
