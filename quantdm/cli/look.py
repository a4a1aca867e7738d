"""Sub-commands that only look: inspect, report, doctor."""

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from quantdm.cli.app import AsJson, Config, ExampleInputs, Overrides, Variant, app, given_inputs, uncollected
from quantdm.cli.given import recipe_given, run_given, runs_given, target_given
from quantdm.errors import QuantDMError


@app.command(epilog="Example: quantdm inspect digits-dit --scheme kmeans-channel-4 --set 'proj_out*=uniform-channel-8'")
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            callback=target_given,
            help="Pipeline, export, lone denoiser or its file, hub id, or a recipe file (*.yaml).",
        ),
    ],
    scheme: Annotated[str | None, typer.Option(help="Show bits and SQNR of every layer under this scheme.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(callback=recipe_given, help="Or under the schemes of this recipe.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of a recipe file, if not the one that it names.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line of CSV per layer.")] = False,
    example_inputs: ExampleInputs = None,
    variant: Variant = None,
    config: Config = None,
) -> None:
    """List the quantizable layers of a pipeline, an export or a recipe's model: shape, scheme, bits, SQNR."""
    with uncollected():
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


@app.command(epilog="Examples: quantdm report runs/mine, or two to compare: quantdm report runs/3bit runs/4bit")
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(callback=runs_given, help="One run directory, or two to compare.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", callback=run_given, help="The same as the argument, for one run.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file (default: report.html there, comparison.html here).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all data of the report, write nothing.")] = False,
) -> None:
    """Write a run's HTML report (one file, opens without network), its insights as SVG and JSON; or compare two."""
    from quantdm.report import write_comparison, write_report
    from quantdm.report.comparison import COMPARISON_FILE
    from quantdm.report.data import report_data
    from quantdm.report.insight_files import save_insights
    from quantdm.report.records import read_records

    given = [*(runs or []), *([] if run_dir is None else [run_dir])]
    if not 1 <= len(given) <= 2:
        raise QuantDMError(
            f"report: got {len(given)} run directories, expected one, or two to compare: quantdm report RUN_DIR"
        )
    if as_json:
        found = [report_data(read_records(folder)) for folder in given]
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1, allow_nan=False))
        return
    if len(given) == 2:
        _tell("comparison", write_comparison(*given, out=out or COMPARISON_FILE))
        return
    path = write_report(given[0], out=out)
    data = report_data(read_records(given[0]))
    for question, sentence in data["answers"].items():
        typer.echo("\n".join(textwrap.wrap(f"{question:<16} {sentence}", 79, subsequent_indent=" " * 17)))
    _tell("report", path)
    if all((given[0] / name).is_file() for name in ("space.json", "recipe.yaml", "attribution.json")):
        typer.echo(f"insights: {save_insights(given[0])[0].parent}")


def _tell(what: str, path: Path) -> None:
    """Print where a page is and how large."""
    typer.echo(f"{what}: {path} ({path.stat().st_size / 1e6:.1f} MB)")


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
