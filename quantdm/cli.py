"""The command line: one sub-command per stage; parse, call, write."""

import os

# Before torch starts its threads: spinning ones slow a second busy process thirty-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import signal
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from quantdm.errors import QuantDMError

app = typer.Typer(
    name="quantdm",
    help="Make a diffusion pipeline small: where precision is worth its bits, in a size you name.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Embedded pipeline (digits-dit, digits-sd), directory or hub id.")]
RunDir = Annotated[Path, typer.Option("--run-dir", help="Run directory: every stage leaves its record there.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
TargetBits = Annotated[float | None, typer.Option(help="Average bits per weight, overhead included.")]
TargetBytes = Annotated[int | None, typer.Option(help="Or the size of the denoiser on disk, in bytes.")]
Trials = Annotated[int, typer.Option(min=1, help="Configurations whose images are measured.")]
Seed = Annotated[int, typer.Option(min=0, help="Determines every sampled configuration and noise.")]
ProtocolFile = Annotated[str | None, typer.Option("--protocol", help="YAML file: what images to measure on.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="PATTERN=SCHEME on top of the recipe; may be repeated, last wins.")
]
ModelCard = Annotated[bool, typer.Option("--model-card", help="Also write README.md: ready for the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command(epilog="Example: quantdm demo --model digits-sd --target-bits 3.0")
def demo(
    model: Annotated[str, typer.Option(help="Embedded pipeline: digits-dit or digits-sd.")] = "digits-dit",
    target_bits: Annotated[float, typer.Option(help="Average bits per weight, overhead included.")] = 3.0,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory (default: runs/MODEL-BITSbit).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every stage with fewer trials and images: two minutes.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Run everything on an embedded pipeline: search, recipe, export, report. Run it again to go on."""
    from quantdm.corridor import demo

    demo(model, target_bits=target_bits, run_dir=run_dir, quick=quick, seed=seed, say=typer.echo)


@app.command(epilog="Example: quantdm inspect digits-dit --scheme kmeans-channel-4 --set 'proj_out*=uniform-channel-8'")
def inspect(
    target: Annotated[str, typer.Argument(help="Pipeline, export, directory, hub id, or a recipe file (*.yaml).")],
    scheme: Annotated[str | None, typer.Option(help="Show bits and SQNR of every layer under this scheme.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Or under the schemes of this recipe.")] = None,
    model: Annotated[str | None, typer.Option(help="The model of a recipe file, if not the one that it names.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line of CSV per layer.")] = False,
) -> None:
    """List the quantizable layers of a pipeline, an export or a recipe's model: shape, scheme, bits, SQNR."""
    from quantdm.listing import inspect_target, layers_csv, layers_text

    record = inspect_target(target, model=model, scheme=scheme, recipe=recipe, overrides=overrides or [])
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        typer.echo(layers_csv(record) if as_csv else layers_text(record), nl=not as_csv)


@app.command(epilog="Example: quantdm bank digits-dit --run-dir runs/mine --target-bits 3.0")
def bank(
    model: Model,
    run_dir: RunDir,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    trials: Trials = 160,
    seed: Seed = 0,
    protocol: ProtocolFile = None,
) -> None:
    """Start a run and quantize every layer with every option (the first stage of `search`, alone)."""
    from quantdm.corridor import start_run
    from quantdm.denoisers.pipeline import get_denoiser
    from quantdm.search import stages

    pipe, run = start_run(
        model, run_dir, target_bits=target_bits, target_bytes=target_bytes, trials=trials, seed=seed, protocol=protocol
    )
    stages.describe(run, get_denoiser(pipe))
    stages.build_bank(run, pipe)
    typer.echo(f"bank: {run.path('bank')}")


@app.command(epilog="Example: quantdm search digits-dit --run-dir runs/mine --target-bits 3.0")
def search(
    model: Model,
    run_dir: RunDir,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    trials: Trials = 160,
    seed: Seed = 0,
    protocol: ProtocolFile = None,
) -> None:
    """Search the recipe of a size: bank, sensitivities, trials, surrogates, selection. Run it again to go on."""
    from quantdm.corridor import start_run
    from quantdm.search.search import find_recipe, open_engine

    pipe, run = start_run(
        model, run_dir, target_bits=target_bits, target_bytes=target_bytes, trials=trials, seed=seed, protocol=protocol
    )
    with open_engine(run, pipe) as engine:
        recipe = find_recipe(run, engine, pipe)
    typer.echo(f"recipe: {run.path('recipe.yaml')}  ({recipe.avg_bits:.4f} bits per weight)")


@app.command(epilog="Example: quantdm fit --run-dir runs/mine")
def fit(run_dir: RunDir) -> None:
    """Fit the surrogates on a run's trials and print how well they rank held-out configurations."""
    from quantdm.files import read_json
    from quantdm.search import stages
    from quantdm.search.run import Run

    run = Run.open(run_dir)
    space = stages.load_space(run)
    stages.fit_surrogates(run, space, *stages.load_trials(run, space))
    scores = read_json(run.path("surrogate.json"))
    for name, folds in scores["held_out_spearman"].items():
        ndcg = scores["held_out_ndcg"][name]
        typer.echo(
            f"{name:<22} Spearman {sum(folds) / len(folds):.3f} (folds {min(folds):.3f} to {max(folds):.3f})  "
            f"NDCG@10 {sum(ndcg) / len(ndcg):.3f}"
        )
    for name, value in scores["without_learning"].items():
        typer.echo(f"{name:<22} Spearman {value:.3f}  (nothing learned)")


@app.command(epilog="Example: quantdm explain --run-dir runs/mine")
def explain(run_dir: RunDir) -> None:
    """Attribute quality to every layer and scheme (attribution.json) and print the operation types that matter."""
    from quantdm.inspection import show_attribution
    from quantdm.search import stages
    from quantdm.search.run import Run

    run = Run.open(run_dir)
    space = stages.load_space(run)
    fitted = stages.fit_surrogates(run, space, *stages.load_trials(run, space))
    show_attribution(space, stages.explain(run, fitted))


@app.command(epilog="Example: quantdm select --run-dir runs/mine --target-bits 3.5 -o recipe-3.5.yaml")
def select(
    run_dir: RunDir,
    out: Out,
    target_bits: Annotated[float, typer.Option(help="Average bits per weight, overhead included.")],
    by: Annotated[str, typer.Option(help="Which explanation chooses: additive, tree or graph.")] = "additive",
) -> None:
    """Choose a recipe of another size from a run's attributions (predicted, not measured)."""
    from quantdm.inspection import select_recipe
    from quantdm.search.run import Run

    recipe = select_recipe(Run.open(run_dir), target_bits=target_bits, by=by)
    typer.echo(f"recipe: {recipe.save(out)}  ({recipe.avg_bits:.4f} bits per weight)")


@app.command(epilog="Example: quantdm apply digits-dit --recipe recipe.yaml -o digits-dit-3bit")
def apply(
    model: Model,
    recipe: Annotated[Path, typer.Option(help="Recipe file.")],
    out: Out,
    overrides: Overrides = None,
    model_card: ModelCard = False,
) -> None:
    """Quantize a pipeline by a recipe and save it packed."""
    from quantdm.card import write_card
    from quantdm.export import export_pipeline
    from quantdm.recipe import load_recipe

    typer.echo(f"pipeline: {export_pipeline(model, load_recipe(recipe).override(overrides or []), out)}")
    if model_card:
        typer.echo(f"model card: {write_card(out)}")


@app.command("import", epilog="Example: quantdm import dit.pkl --model facebook/DiT-XL-2-256 -o recipe.yaml")
def import_(
    file: Annotated[Path, typer.Argument(help="Published configuration, or trials (quant_cache.pkl).")],
    model: Annotated[str, typer.Option(help="Pipeline it is for: directory, hub id or config.json of the denoiser.")],
    out: Out,
) -> None:
    """Turn a published configuration into a recipe, or published trials into a folder of trial records."""
    from quantdm.denoisers.layers import list_layers
    from quantdm.hub.reference import import_recipe, import_trials
    from quantdm.hub.skeleton import open_skeleton
    from quantdm.search.store import TrialStore

    layers = list_layers(open_skeleton(model))
    if out.suffix in (".yaml", ".yml"):
        recipe = import_recipe(file, layers, model=model)
        typer.echo(f"recipe: {recipe.save(out)}  ({recipe.avg_bits:.4f} bits per weight)")
        for note in recipe.provenance.notes:
            typer.echo(f"  {note}")
        return
    store = TrialStore(out)
    for key, trial in import_trials(file, layers):
        store.put(key, trial)
    typer.echo(f"trials: {out}  ({len(store)} records)")


@app.command(epilog="Example: quantdm schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of recipe files, for editors and other tools."""
    from quantdm.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=1))


@app.command(epilog="Example: quantdm correct --run-dir runs/mine --bits 6")
def correct(
    run_dir: RunDir,
    bits: Annotated[int, typer.Option(help="Activation bits: 6, 8 or 16 (not quantized).")] = 6,
    images: Annotated[int, typer.Option(help="Trajectories for the noise statistics.")] = 128,
) -> None:
    """Fit the correction of the sampler for a run's recipe and print which variant helps."""
    from quantdm.corridor import correct_recipe
    from quantdm.search.run import Run

    run = Run.open(run_dir)
    correction = correct_recipe(run, bits=bits, images=images)
    for variant, distances in correction.measured.items():
        mark = "  <- kept" if variant == correction.variant else ""
        typer.echo(f"{variant:<14} fid_fp {sum(distances) / len(distances):.4f}{mark}")
    typer.echo(f"correction: {run.path('correction.safetensors')}")


@app.command(epilog="Example: quantdm generate digits-sd -o digits.png --images 40")
def generate(
    model: Model,
    out: Out,
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 40,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the protocol's).")] = None,
    protocol: ProtocolFile = None,
    columns: Annotated[int, typer.Option(min=1, help="Images per row of the grid.")] = 10,
) -> None:
    """Generate images as one PNG grid."""
    from quantdm.inspection import generate_grid

    path = generate_grid(model, out, images=images, seed=seed, steps=steps, protocol=protocol, columns=columns)
    typer.echo(f"images: {path}")


@app.command(epilog="Example: quantdm evaluate runs/mine/export --reference digits-dit")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Full-precision pipeline, given the same noises.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Images per draw.")] = 1000,
    seeds: Annotated[str, typer.Option(help="Base seeds, one draw each.")] = "101,102,103",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the protocol's).")] = None,
    protocol: ProtocolFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure a pipeline: FID to full precision with equal noise, paired error, FID to real images."""
    from quantdm.inspection import evaluate_model

    try:
        draws = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise QuantDMError(
            f"seeds: got {seeds!r}, expected whole numbers with commas between, e.g. 101,102,103"
        ) from None
    result = evaluate_model(model, reference=reference, images=images, seeds=draws, steps=steps, protocol=protocol)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    typer.echo(f"{model}: {result['protocol']}")
    for key, value in result["mean"].items():
        typer.echo(f"  {key:<10} " + ("-" if value is None else f"{value:.4f} ± {result['sd'][key]:.4f}"))


@app.command(epilog="Example: quantdm export --run-dir runs/mine -o digits-dit-3bit --model-card")
def export(run_dir: RunDir, out: Out, model_card: ModelCard = False) -> None:
    """Write a run's result as a directory that plain diffusers opens."""
    from quantdm.card import write_card
    from quantdm.corridor import export_run
    from quantdm.search.run import Run

    run = Run.open(run_dir)
    typer.echo(f"export: {export_run(run, out)}")
    if model_card:
        summary = run.path("summary.json")
        typer.echo(f"model card: {write_card(out, summary=summary if summary.is_file() else None)}")


@app.command(epilog="Example: quantdm report --run-dir runs/mine")
def report(run_dir: RunDir) -> None:
    """Write a run's HTML report (one file, opens without network), and its insights as SVG and JSON."""
    from quantdm.report import write_report
    from quantdm.report.insight_files import save_insights

    typer.echo(f"report: {write_report(run_dir)}")
    if all((run_dir / name).is_file() for name in ("space.json", "recipe.yaml", "attribution.json")):
        typer.echo(f"insights: {save_insights(run_dir)[0].parent}")


@app.command(epilog="Example: quantdm doctor")
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has: versions, devices, which paths are fast here, what is missing."""
    from quantdm.doctor import examine_machine

    record = examine_machine()
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    for key, value in record.items():
        typer.echo("\n".join(textwrap.wrap(f"{key:<24} {value}", 79, subsequent_indent=" " * 25)))


class Interrupted(BaseException):
    """Ctrl-C. typer would swallow a KeyboardInterrupt without a word."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def main() -> None:
    """Run the command line: bad input is one line on standard error, Ctrl-C says how to go on."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except QuantDMError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except Interrupted:
        typer.echo("\ninterrupted: what is finished is kept; run the same command again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
