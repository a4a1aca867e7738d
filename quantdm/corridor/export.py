"""A run's result as a directory that plain diffusers opens."""

from pathlib import Path

from quantdm.denoisers.given_inputs import parse_inputs
from quantdm.hub.export import export_pipeline
from quantdm.recipe import load_recipe
from quantdm.runs.bank import WeightBank
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space


def export_run(run: Run, folder: str | Path) -> Path:
    """Write a run's recipe, applied, as a directory that plain diffusers opens."""
    recipe = load_recipe(run.path("recipe.yaml"))
    bank = WeightBank.open(run.path("bank"), load_space(run).layers, run.settings.schemes)
    inputs = {part: parse_inputs(record) for part, record in run.settings.seen.example_inputs.items()}
    correction = run.path("correction.safetensors")
    return export_pipeline(
        run.location,
        recipe,
        folder,
        bank=bank,
        correction=correction if correction.is_file() else None,
        example_inputs=inputs or None,
    )
