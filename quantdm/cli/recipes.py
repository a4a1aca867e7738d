"""Sub-commands that take or make recipes: apply, export, import, schema."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantdm.cli.app import (
    BegunRun,
    Config,
    ExampleInputs,
    ModelCard,
    Out,
    Overrides,
    ProtocolFile,
    Variant,
    app,
    given_inputs,
)
from quantdm.cli.given import recipe_given, source_given
from quantdm.errors import counted

if TYPE_CHECKING:
    from quantdm.recipe import CalibrationSpec

Source = Annotated[
    str,
    typer.Argument(
        callback=source_given,
        help="Embedded pipeline, directory of a pipeline or denoiser, safetensors file or hub id.",
    ),
]

Insist = Annotated[
    bool, typer.Option("--insist", help="Also take schemes that cost more bits on their layer than they save.")
]
SameArchitecture = Annotated[
    bool, typer.Option("--same-architecture", help="Take a recipe that was found on other weights.")
]


@app.command(epilog="Example: quantdm apply digits-dit --recipe recipe.yaml -o digits-dit-3bit")
def apply(
    model: Source,
    recipe: Annotated[Path, typer.Option(callback=recipe_given, help="Recipe file.")],
    out: Out,
    overrides: Overrides = None,
    model_card: ModelCard = False,
    example_inputs: ExampleInputs = None,
    variant: Variant = None,
    config: Config = None,
    protocol: ProtocolFile = None,
    insist: Insist = False,
    same_architecture: SameArchitecture = False,
) -> None:
    """Quantize a pipeline by a recipe and save it packed, layer by layer; run it again to go on after a kill.

    A calibrated recipe opens the whole pipeline and runs it first, on what the recipe says or on --protocol.
    """
    from quantdm.errors import QuantDMError
    from quantdm.hub.export import export_pipeline
    from quantdm.hub.inspection import file_bytes, left_in
    from quantdm.hub.model_card import write_card
    from quantdm.hub.replace import check_export_path
    from quantdm.hub.worth import check_worth
    from quantdm.pipelines.source import is_lone, open_source
    from quantdm.recipe import load_recipe

    chosen = load_recipe(recipe).override(overrides or [])
    if protocol is not None:  # for calibrated schemes; what the recipe says otherwise
        chosen = chosen.model_copy(update={"calibration": _told(chosen.calibration, protocol)})
    if model_card and is_lone(model):
        raise QuantDMError(f"--model-card: is for pipelines, and {model} is a lone denoiser; leave it out")
    inputs = given_inputs(example_inputs)
    if not insist:
        check_export_path(out, model)
        check_worth(open_source(model, variant=variant, config=config).pipe, chosen, inputs)
    made = export_pipeline(
        model, chosen, out, example_inputs=inputs, variant=variant, config=config, same_architecture=same_architecture
    )
    typer.echo(f"pipeline: {made}")
    _say_sizes(file_bytes(model, variant=variant, config=config), file_bytes(made), left_in(made))
    if model_card:
        typer.echo(f"model card: {write_card(out, source=model)}")


def _say_sizes(before: int | None, after: int | None, left: str | None) -> None:
    if before and after:  # a hub's files are not on this disk
        typer.echo(f"weights on disk, all parts: {before / 1e6:,.2f} MB before, {after / 1e6:,.2f} MB now")
    if left is not None:
        typer.echo(left)


def _told(spec: "CalibrationSpec | None", protocol: str) -> "CalibrationSpec":
    """Return what to calibrate on: another protocol, the rest as the recipe has it; a file goes into the recipe."""
    from quantdm.pipelines.protocol import known_protocols, load_protocol
    from quantdm.recipe import CalibrationSpec

    found = protocol if protocol in known_protocols() else load_protocol(protocol).model_dump(mode="json")
    return CalibrationSpec(**{**({} if spec is None else spec.model_dump()), "protocol": found})


@app.command(epilog="Example: quantdm export --run-dir runs/mine -o digits-dit-3bit --model-card")
def export(
    run_dir: BegunRun,
    out: Out,
    model_card: ModelCard = False,
    corrected: Annotated[
        bool, typer.Option("--corrected", help="With the run's correction and the activations it was fitted for.")
    ] = False,
) -> None:
    """Write a run's result as a directory that plain diffusers opens."""
    from quantdm.corridor.export import export_run
    from quantdm.hub.model_card import write_card
    from quantdm.runs.run import Run

    run = Run.open(run_dir)
    typer.echo(f"export: {export_run(run, out, corrected=corrected, say=typer.echo)}")
    if model_card:
        summary = run.path("summary.json")
        card = write_card(out, summary=summary if summary.is_file() else None, source=run.location)
        typer.echo(f"model card: {card}")


@app.command(epilog="Example: quantdm gguf flux-4bit -o flux-4bit.gguf")
def gguf(
    export: Annotated[str, typer.Argument(help="Directory of a quantized pipeline.")],
    out: Out,
    part: Annotated[str | None, typer.Option(help="Which denoiser, where a pipeline has several.")] = None,
    names: Annotated[
        str, typer.Option(help="Whose names the tensors have: diffusers, or original for ComfyUI and its like.")
    ] = "diffusers",
) -> None:
    """Write the denoiser of an export as a GGUF file, for diffusers, ComfyUI and other programs that read that format.

    Its linear layers stay small where the format holds them exactly: see docs/gguf.md for the schemes to choose.
    """
    from quantdm.hub.gguf import export_gguf
    from quantdm.pipelines.loading import load_pipeline

    counts = export_gguf(load_pipeline(export), out, part=part, names=names)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    typer.echo(f"gguf: {out}  {out.stat().st_size / 1e6:.2f} MB  ({told} tensors)")


@app.command("import", epilog="Example: quantdm import dit.pkl --model facebook/DiT-XL-2-256 -o recipe.yaml")
def import_(
    file: Annotated[Path, typer.Argument(help="Published configuration, or trials (quant_cache.pkl).")],
    model: Annotated[str, typer.Option(help="Pipeline it is for: directory, hub id or config.json of the denoiser.")],
    out: Out,
) -> None:
    """Turn a published configuration into a recipe, or published trials into a folder of trial records."""
    from quantdm.denoisers.inventory import list_layers
    from quantdm.hub.importer.published import import_recipe, import_trials
    from quantdm.pipelines.skeleton import open_skeleton
    from quantdm.recipe import check_recipe_path
    from quantdm.runs.store import TrialStore

    store = TrialStore(out)
    if out.suffix in (".yaml", ".yml"):
        check_recipe_path(out)
    else:
        store.check_own()
    layers = list_layers(open_skeleton(model))
    if out.suffix in (".yaml", ".yml"):
        recipe = import_recipe(file, layers, model=model)
        typer.echo(f"recipe: {recipe.save(out)}  ({recipe.avg_bits:.4f} bits per weight)")
        for note in recipe.provenance.notes:
            typer.echo(f"  {note}")
        return
    trials = list(import_trials(file, layers))
    store.check_own({key for key, _ in trials})
    for key, trial in trials:
        store.put(key, trial)
    typer.echo(f"trials: {out}  ({counted(len(store), 'record')})")


@app.command(epilog="Example: quantdm schema > recipe.schema.json")
def schema(
    protocol: Annotated[bool, typer.Option("--protocol", help="Of protocol files instead of recipes.")] = False,
) -> None:
    """Print the JSON schema of recipe files, or of protocol files, for editors and other tools."""
    from quantdm.pipelines.protocol import protocol_schema
    from quantdm.recipe import recipe_schema

    typer.echo(json.dumps(protocol_schema() if protocol else recipe_schema(), indent=1))
