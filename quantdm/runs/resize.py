"""Another size from a run's attributions, or from its one-layer sensitivities."""

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.errors import QuantDMError
from quantdm.files import read_json
from quantdm.machine import versions
from quantdm.recipe import Provenance, Recipe, joint_rules
from quantdm.runs.explain import leading_of, load_attributions
from quantdm.runs.labels import calibration_of
from quantdm.runs.run import Run
from quantdm.runs.stages import RECORD_VERSION, load_space

SENSITIVITY = "sensitivity"  # what one-layer noise errors choose, beside the explanations


def select_recipe(run: Run, *, target_bits: float, by: str | None = None) -> Recipe:
    """Choose a recipe of another size from a run's attributions or sensitivities; it is not measured, and says so.

    Args:
        run: with attributions.
        target_bits: average bits per weight, overhead included.
        by: the explanation that chooses: additive, tree, graph or sensitivity; None: the one that counts most in the
            run (`quantdm.runs.explain.leading`).
    """
    space, attributions = load_space(run), load_attributions(run)
    values = {name: each.values for name, each in attributions.items()} | {SENSITIVITY: -space.noise_error}
    by = leading_of(run, values) if by is None else by
    if by not in values:
        raise QuantDMError(f"by: got {by!r}, expected one of {', '.join(values)}")
    source = "one-layer sensitivities" if by == SENSITIVITY else f"the {by} surrogate"
    choice = select(space, values[by], target_bits=target_bits, forbidden=dominated(space))
    labels = space.config(choice).to_labels()
    return Recipe(
        model=run.settings.model,
        **joint_rules(labels, run.settings.seen.denoisers, embeddings=run.settings.embeddings),
        calibration=calibration_of(run.settings, labels),
        avg_bits=round(float(space.avg_bits(choice)[0]), 6),
        provenance=Provenance(
            source=f"predicted by {source}, not measured",
            quantdm=versions().get("quantdm"),
            seed=run.settings.seed,
            trials=read_json(run.path("surrogate.json"), version=RECORD_VERSION).get("trials", run.settings.trials),
            target=f"{target_bits:g} bits per weight",
            weights=run.settings.seen.weights,
        ),
    )
