"""One budget for a whole pipeline, from a finished run: other parts by their images, denoisers by an explanation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantdm.errors import QuantDMError
from quantdm.recipe import Provenance, Recipe, joint_rules
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import leading_of, load_attributions
from quantdm.runs.labels import calibration_of
from quantdm.runs.run import Run
from quantdm.runs.shares import Shares, choose_within, share_out
from quantdm.runs.stages import load_space
from quantdm.schemes import QuantConfig
from quantdm.surrogates import SearchSpace


@dataclass(frozen=True)
class Split:
    """How a budget was spent: the recipe, the bytes of every part, and the scheme of those that are no denoisers."""

    recipe: Recipe
    nbytes: dict[str, int]
    schemes: dict[str, str]

    def __str__(self) -> str:
        """Return a line per part."""
        total = sum(self.nbytes.values())
        lines = [
            f"{name:<24} {count:>14,} bytes  {100 * count / total:5.1f} %  {self.schemes.get(name, 'mixed')}"
            for name, count in self.nbytes.items()
        ]
        return "\n".join([*lines, f"{'pipeline':<24} {total:>14,} bytes"])


def select_pipeline(run: Run, *, target_bytes: int, by: str | None = None) -> Split:
    """Choose a recipe for a whole pipeline whose weight files take `target_bytes` at most.

    The losses are Frechet distances to the full-precision images: of every other part under each of its options alone,
    and of the denoisers at some sizes, each the choice of the explanation `by` (None: the one that counts most in the
    run, `quantdm.runs.explain.leading`). Losses of parts add up to first order,
    and of all splits within the budget that with the least sum is taken. Files that are no weights are not counted.

    Raises:
        QuantDMError: a run of a pipeline in memory, which has no files; an unknown explanation; or a budget that no
            split meets (the least is stated).
    """
    space, attributions = load_space(run), load_attributions(run)
    by = leading_of(run, attributions) if by is None else by
    if by not in attributions:
        raise QuantDMError(f"by: got {by!r}, expected one of {', '.join(attributions)}")
    if not run.settings.location:
        raise QuantDMError("target: the run is of a pipeline in memory; save it and search the saved one")
    values = attributions[by].values
    with Engine(run, run.open_subject(), workers=1) as engine:
        shares = share_out(run, engine, space, values, target_bytes, at_most=False)
    return _split(run, space, values, shares, by)


def _split(run: Run, space: SearchSpace, values: np.ndarray, shares: Shares, by: str) -> Split:
    settings, chosen = run.settings, shares.chosen
    labels = choose_within(space, values, shares.size, shares.rest)
    bits = float(space.avg_bits(space.choice_of(QuantConfig.from_labels(labels)))[0])
    recipe = Recipe(
        model=settings.model,
        **_rules(run, labels, shares),
        calibration=calibration_of(settings, labels),
        avg_bits=round(bits, 6),
        provenance=Provenance(
            source=f"predicted by the {by} surrogate and the losses of the parts alone, not measured as a whole",
            seed=settings.seed,
            target=f"{shares.room.target} bytes, the weights of the whole pipeline",
            weights=settings.seen.weights,
        ),
    )
    nbytes = {", ".join(settings.seen.denoisers): shares.size.of(labels)}
    nbytes |= {name: choice.nbytes for name, choice in chosen.items()}
    return Split(recipe, nbytes, {name: choice.label or "original" for name, choice in chosen.items()})


def _rules(run: Run, labels: Mapping[str, str | None], shares: Shares) -> dict[str, Any]:
    rules = joint_rules(labels, run.settings.seen.denoisers, embeddings=run.settings.embeddings)
    for part in shares.room.others:
        own = part.component(shares.chosen[part.name].scheme)
        if own is not None:
            rules["components"][part.name] = own
    return rules
