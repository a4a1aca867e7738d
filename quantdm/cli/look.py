"""Sub-commands that only look: inspect, report, doctor."""

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from quantdm.cli.app import AsJson, Config, ExampleInputs, Overrides, RunDir, Variant, app, given_inputs


@app.command(epilog="Example: quantdm inspect digits-dit --scheme kmeans-channel-4 --set 'proj_out*=uniform-channel-8'")
def inspect(
    target: Annotated[
        str, typer.Argument(help="Pipeline, export, lone denoiser or its file, hub id, or a recipe file (*.yaml).")
    ],
    scheme: Annotated[str | None, typer.Option(help="Show bits and SQNR of every layer under this scheme.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Or under the schemes of this recipe.")] = None,
    model: Annotated[str | None, typer.Option(help="The model of a recipe file, if not the one that it names.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line of CSV per layer.")] = False,
    example_inputs: ExampleInputs = None,
    variant: Variant = None,
    config: Config = None,
) -> None:
    """List the quantizable layers of a pipeline, an export or a recipe's model: shape, scheme, bits, SQNR."""
    from quantdm.cli.layer_table import layers_csv, layers_text
    from quantdm.hub.inspection import inspect_target

    record = inspect_target(
        target,
        model=model,
        scheme=scheme,
        recipe=recipe,
        overrides=overrides or [],
        example_inputs=given_inputs(example_inputs),
        variant=variant,
        config=config,
    )
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        typer.echo(layers_csv(record) if as_csv else layers_text(record), nl=not as_csv)


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
    from quantdm.cli.doctor import examine_machine

    record = examine_machine()
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    for key, value in record.items():
        typer.echo("\n".join(textwrap.wrap(f"{key:<24} {value}", 79, subsequent_indent=" " * 25)))
