"""A run's result as a directory that plain diffusers opens."""

from pathlib import Path

from quantdm.denoisers.inventory import list_layers
from quantdm.hub.export import export_pipeline
from quantdm.pipelines.loading import load_pipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import load_recipe
from quantdm.runs.bank import WeightBank
from quantdm.runs.run import Run


def export_run(run: Run, folder: str | Path) -> Path:
    """Write a run's recipe, applied, as a directory that plain diffusers opens."""
    recipe = load_recipe(run.path("recipe.yaml"))
    layers = list_layers(get_denoiser(load_pipeline(run.settings.model)))
    bank = WeightBank.open(run.path("bank"), layers, run.settings.schemes)
    correction = run.path("correction.safetensors")
    return export_pipeline(
        run.settings.model, recipe, folder, bank=bank, correction=correction if correction.is_file() else None
    )
