"""A run's result as a directory that plain diffusers opens."""

from collections.abc import Callable, Mapping
from pathlib import Path

from quantdm.bank.weight_bank import WeightBank
from quantdm.correction import load_correction
from quantdm.correction.record import is_current
from quantdm.denoisers.given_inputs import parse_inputs
from quantdm.errors import QuantDMError
from quantdm.files import read_json, tensors_digest
from quantdm.hub.export import export_pipeline
from quantdm.hub.replace import CORRECTION_FILE, check_export_path
from quantdm.recipe import Recipe, load_recipe
from quantdm.runs.labels import weights_of
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.tune import used_tuning
from quantdm.runs.tuned import TunedWeights


def export_run(
    run: Run,
    folder: str | Path,
    *,
    corrected: bool = False,
    tuned: bool = True,
    say: Callable[[str], object] = print,
) -> Path:
    """Write a run's recipe, applied, as a directory that plain diffusers opens.

    A correction travels along if it was fitted for just this recipe. One that was fitted for quantized activations
    does so with `corrected` only, and the exported recipe has these activations then; else it is left out, and said.

    Args:
        run: a run that has chosen its recipe.
        folder: where it is written, see `export_pipeline`.
        corrected: export the run's correction and the activations that it was fitted for.
        tuned: whether tuned weights are exported, if the run has some that helped.
        say: is told what becomes of the correction.

    Raises:
        QuantDMError: no recipe yet, no correction that belongs to it where one was asked for, or the folder is refused.
    """
    check_export_path(folder, run.location, apart_from=run.folder)
    recipe = load_recipe(run.path("recipe.yaml"))
    labels = weights_of(run, recipe, load_space(run).layers)
    bank, recipe, tuning = _bank(run, recipe, labels, tuned=tuned)
    recipe, correction, note = _pair(run, recipe, labels, corrected)
    inputs = {part: parse_inputs(record) for part, record in run.settings.seen.example_inputs.items()}
    for line in filter(None, (note, tuning)):
        say(line)
    return export_pipeline(
        run.location, recipe, folder, bank=bank, correction=correction, example_inputs=inputs or None
    )


def _bank(
    run: Run, recipe: Recipe, labels: Mapping[str, str | None], *, tuned: bool
) -> tuple[WeightBank | TunedWeights, Recipe, str]:
    """Return the weights to export, tuned if that helped, the recipe that says so, and what is to be said."""
    plain = WeightBank.open(run.path("bank"), load_space(run).layers, run.settings.bank_schemes)
    path = used_tuning(run) if tuned else None
    if path is None:
        return plain, recipe, ""
    weights = TunedWeights.load(path)
    try:
        weights.check(labels)
    except QuantDMError as error:
        return plain, recipe, f"tuning: left out ({error})"
    provenance = recipe.provenance.model_copy(update={"tuning": tensors_digest(path)})
    return weights, recipe.model_copy(update={"provenance": provenance}), "tuning: exported"


def _pair(
    run: Run, recipe: Recipe, labels: Mapping[str, str | None], corrected: bool
) -> tuple[Recipe, Path | None, str]:
    """Return the recipe and the correction that belong together, and what is to be said."""
    path = run.path(CORRECTION_FILE)
    if not path.is_file():
        if corrected:
            raise QuantDMError(f"no correction in {run.folder}; fit one with `quantdm correct --run-dir {run.folder}`")
        return recipe, None, ""
    if not corrected and not is_current(path):
        again = f"quantdm correct --run-dir {run.folder}"
        return recipe, None, f"correction: left out (it is of an earlier quantdm; fit it again: {again})"
    correction = load_correction(path)
    if corrected:
        notes = recipe.provenance.notes
        if correction.activations != recipe.activations:
            notes = (*notes, "activations and correction were added after the search, its figures are without them")
        provenance = recipe.provenance.model_copy(update={"notes": notes})
        recipe = recipe.model_copy(update={"activations": correction.activations, "provenance": provenance})
        correction.check_belongs(labels, recipe.activations)
        _check_tuning(run, recipe)
        bits = "are not quantized" if recipe.activations is None else f"have {recipe.activations.bits} bits"
        return recipe, path, f"correction: exported, activations {bits} as it was fitted for"
    if recipe.activations is None and correction.activations is not None:
        bits = correction.activations.bits
        return recipe, None, (
            f"correction: left out, for it belongs to {bits}-bit activations and this export keeps them in full "
            f"precision; with both: quantdm export --run-dir {run.folder} -o FOLDER --corrected"
        )  # fmt: skip
    try:
        correction.check_belongs(labels, recipe.activations)
        _check_tuning(run, recipe)
    except QuantDMError as error:
        return recipe, None, f"correction: left out ({error})"
    return recipe, path, "correction: exported"


def _check_tuning(run: Run, recipe: Recipe) -> None:
    """Check that a run's correction was fitted for the weights that are exported, tuned or not."""
    record = run.path("correction_steps.json")
    fitted = read_json(record).get("tuning") if record.is_file() else None
    if fitted != recipe.provenance.tuning:
        was = "untuned weights" if fitted is None else "other tuned weights"
        raise QuantDMError(f"correction was fitted for {was}; fit it again: quantdm correct --run-dir {run.folder}")
