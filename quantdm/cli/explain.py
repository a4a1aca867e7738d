"""The sub-command that explains: what layers and schemes are worth, and why one recipe is better than another."""

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from quantdm.cli.app import AsJson, RunDir, app
from quantdm.errors import QuantDMError

WIDTH = 79


@app.command(epilog="Example: quantdm explain --run-dir runs/mine --recipe r.yaml --against uniform-channel-4")
def explain(
    run_dir: RunDir,
    recipe: Annotated[str | None, typer.Option(help="Explain this recipe file (or a scheme everywhere)...")] = None,
    against: Annotated[str | None, typer.Option(help="...held against this one.")] = None,
    by: Annotated[str, typer.Option(help="Whose prediction: graph, additive or tree.")] = "graph",
    top: Annotated[int, typer.Option(min=1, help="How many layers to list.")] = 12,
    as_json: AsJson = False,
) -> None:
    """Attribute quality to every layer and scheme, or say why one recipe is better than another."""
    from quantdm.cli.tables import show_attribution
    from quantdm.runs.explain import SURROGATES, fit_surrogates
    from quantdm.runs.explain import explain as explain_run
    from quantdm.runs.run import Run
    from quantdm.runs.stages import load_space
    from quantdm.runs.trials import load_labels

    if (recipe is None) != (against is None):
        raise QuantDMError(
            "explain: give both --recipe and --against, or neither; a recipe is explained by a difference"
        )
    if by not in SURROGATES:
        raise QuantDMError(f"by: got {by!r}, expected one of {', '.join(SURROGATES)}")
    run = Run.open(run_dir)
    space = load_space(run)
    fitted = fit_surrogates(run, space, *load_labels(run, space))
    if recipe is None or against is None:
        show_attribution(space, explain_run(run, fitted))
        _show_advice(run_dir)
        return
    _explain_recipe(run, fitted[by], recipe, against, top=top, as_json=as_json)


def _show_advice(run_dir: Path) -> None:
    """Print what names are worth, and sentences to act on where the run has a recipe."""
    from quantdm.report.insight_files import sentences_of
    from quantdm.report.records import read_records

    for sentence in sentences_of(read_records(run_dir)):
        typer.echo(textwrap.fill(sentence.replace("\u00a0", " "), WIDTH, subsequent_indent="  "))


def _explain_recipe(run: Any, surrogate: Any, recipe: str, against: str, *, top: int, as_json: bool) -> None:
    from quantdm.runs.why import choice_of, measured_difference
    from quantdm.surrogates import explain_one

    space = surrogate.space
    choice, reference = choice_of(run, space, recipe), choice_of(run, space, against)
    found = explain_one(surrogate, choice, reference)
    measured = measured_difference(run, space, choice, reference)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "measured": measured}, indent=1))
        return
    typer.echo(f"{surrogate.name} surrogate, y = -log(fid_fp), larger is better")
    for name, value in ((f"{against} (base)", found.base), (recipe, found.predicted)):
        typer.echo(f"  {_short(name, 44):<44} y {value:+7.3f}  fid_fp {np.exp(-value):.4f}")
    sd = float(surrogate.split_difference(choice, reference)[1:].sum(axis=1).std())
    typer.echo(f"difference predicted   {found.difference:+.3f}, sd over folds {sd:.3f}")
    if measured:
        spread = (
            f", sd {np.std(measured, ddof=1):.3f} over {len(measured)} draws" if len(measured) > 1 else ", one draw"
        )
        typer.echo(f"difference measured    {np.mean(measured):+.3f}{spread}")
    else:
        typer.echo("difference measured    not in this run: the two were not measured on the same noises")
    layers = found.ranked(top)
    if not len(layers):
        typer.echo("The two are the same configuration.")
        return
    _show_layers(found, layers)
    differ = int((choice != reference).sum())
    typer.echo(
        f"{len(layers)} of {differ} layers that differ: {100 * found.share(layers):.0f} % of all that changed "
        "(sum of sizes)"
    )


def _show_layers(found: Any, layers: np.ndarray) -> None:
    """Print a table of layers, what they had and have, and what that contributes."""
    space = found.space
    table = Table(width=WIDTH, box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("base", overflow="fold")
    table.add_column("recipe", overflow="fold")
    table.add_column("share of y", justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(
            space.layer_names[layer],
            space.labels[found.reference[layer]],
            space.labels[found.choice[layer]],
            f"{found.contributions[layer]:+.3f} ± {found.spread[layer]:.3f}",
        )
    Console(width=WIDTH).print(table)


def _short(name: str, width: int) -> str:
    """Return the end of a name that is too long: of a path that is what tells files apart."""
    return name if len(name) <= width else f"...{name[3 - width :]}"
