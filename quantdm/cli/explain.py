"""The sub-command that explains: what layers and schemes are worth, and why one recipe is better than another."""

import json
import math
import textwrap
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quantdm.cli.app import AsJson, BegunRun, app
from quantdm.errors import QuantDMError, counted

WIDTH = 79


@app.command(epilog="Example: quantdm explain --run-dir runs/mine --recipe r.yaml --against uniform-channel-4")
def explain(
    run_dir: BegunRun,
    recipe: Annotated[str | None, typer.Option(help="Explain this recipe file (or a scheme everywhere)...")] = None,
    against: Annotated[str | None, typer.Option(help="...held against this one.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Whose prediction: graph, additive or tree; default: what won the run.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to list.")] = 12,
    paths: Annotated[bool, typer.Option("--paths", help="Measure which edges carry a recipe's damage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Attribute quality to every layer and scheme, or say why one recipe is better than another.

    With --paths: which edges of the denoiser's data flow carry the damage of the run's recipe (or of --recipe).
    """
    from quantdm.cli.tables import show_attribution
    from quantdm.runs.explain import SURROGATES, fit_surrogates, leading_of
    from quantdm.runs.explain import explain as explain_run
    from quantdm.runs.run import Run
    from quantdm.runs.stages import load_space
    from quantdm.runs.trials import load_labels

    if paths and against is None:
        _show_paths(run_dir, recipe, top=top, as_json=as_json)
        return
    if paths or (recipe is None) != (against is None):
        raise QuantDMError(
            "explain: give both --recipe and --against, or neither; a recipe is explained by a difference. --paths "
            "goes with --recipe alone"
        )
    if by is not None and by not in SURROGATES:
        raise QuantDMError(f"by: got {by!r}, expected one of {', '.join(SURROGATES)}")
    run = Run.open(run_dir)
    space = load_space(run)
    fitted = fit_surrogates(run, space, *load_labels(run, space))
    if recipe is None or against is None:
        show_attribution(space, explain_run(run, fitted))
        _show_advice(run_dir)
        return
    _explain_recipe(run, fitted[by or leading_of(run, fitted)], recipe, against, top=top, as_json=as_json)


def _show_paths(run_dir: Path, recipe: str | None, *, top: int, as_json: bool) -> None:
    """Measure and print which edges carry the damage."""
    from quantdm.report.paths import say_paths
    from quantdm.runs.paths import find_paths
    from quantdm.runs.run import Run
    from quantdm.runs.stages import load_space
    from quantdm.runs.why import choice_of

    run = Run.open(run_dir)
    space = load_space(run)
    given = recipe or run.path("recipe.yaml")
    name = "the recipe" if recipe is None else Path(recipe).name
    labels = space.config(choice_of(run, space, given)).to_labels()
    record = find_paths(run, labels, name)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    typer.echo(textwrap.fill(say_paths(record).replace("\u00a0", " "), WIDTH))
    table = Table(width=WIDTH, box=None, padding=(0, 1, 0, 0))
    for title in ("from", "to"):
        table.add_column(title, overflow="fold")
    table.add_column("undoes alone", justify="right", no_wrap=True)
    for index in record["carrying"][:top]:
        edge = record["edges"][index]
        table.add_row(edge["source"], edge["target"], f"{100 * edge['undoes']:.1f} %")
    Console(width=WIDTH).print(table)


def _show_advice(run_dir: Path) -> None:
    """Print what names are worth, and sentences to act on where the run has a recipe."""
    from quantdm.report.insight_files import sentences_of
    from quantdm.report.records import read_records

    for sentence in sentences_of(read_records(run_dir)):
        typer.echo(textwrap.fill(sentence.replace("\u00a0", " "), WIDTH, subsequent_indent="  "))


def _explain_recipe(run: Any, surrogate: Any, recipe: str, against: str, *, top: int, as_json: bool) -> None:
    from quantdm.runs.why import choice_of, measured_difference
    from quantdm.surrogates import explain_one
    from quantdm.surrogates.smallest_set import SHARE, carrying_layers

    space = surrogate.space
    choice, reference = choice_of(run, space, recipe), choice_of(run, space, against)
    found = explain_one(surrogate, choice, reference)
    measured = measured_difference(run, space, choice, reference)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "measured": measured}, indent=1))
        return
    typer.echo(f"{surrogate.name} surrogate, y = -log(fid_fp), larger is better")
    for name, value in ((f"{against} (base)", found.base), (recipe, found.predicted)):
        typer.echo(f"  {_short(name, 44):<44} y {value:+7.3f}  fid_fp {math.exp(-value):.4f}")
    sd = float(surrogate.split_difference(choice, reference)[1:].sum(axis=1).std())
    typer.echo(f"difference predicted   {found.difference:+.3f}, sd over folds {sd:.3f}")
    if measured:
        spread = f", sd {stdev(measured):.3f} over {len(measured)} draws" if len(measured) > 1 else ", one draw"
        typer.echo(f"difference measured    {fmean(measured):+.3f}{spread}")
    else:
        typer.echo("difference measured    not in this run: the two were not measured on the same noises")
    layers = found.ranked(top)
    if not len(layers):
        typer.echo("The two are the same configuration.")
        return
    _show_layers(found, layers)
    differ = int((choice != reference).sum())
    typer.echo(
        f"{len(layers)} of {counted(differ, 'layer')} that differ: {100 * found.share(layers):.0f} % of all that "
        "changed (sum of sizes)"
    )
    carrying = carrying_layers(surrogate, choice, reference)
    names = ", ".join(space.layer_names[layer] for layer in carrying.members[:top])
    text = f"Needed and enough for {100 * SHARE:.0f} % of the difference: {counted(carrying.size, 'layer')}: {names}"
    typer.echo(textwrap.fill(text + (" ..." if carrying.size > top else ""), WIDTH, subsequent_indent="  "))


def _show_layers(found: Any, layers: Any) -> None:
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
