"""Sub-commands on run directories: how far one is, trials in and out."""

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from quantdm.cli.app import AsJson, app
from quantdm.errors import counted
from quantdm.progress import duration

RunFolder = Annotated[Path, typer.Argument(help="Run directory.")]
trials_app = typer.Typer(help="Carry the trials of a run to another machine.", no_args_is_help=True)
app.add_typer(trials_app, name="trials")


@app.command(epilog="Example: quantdm status runs/digits-dit-3bit")
def status(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Show how far a run is, how fast it goes, and who works on what; harmless while it works."""
    import json
    from dataclasses import asdict

    from quantdm.runs.status import status_of

    found = status_of(run_dir)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"minutes_left": found.minutes_left}, indent=1))
        return
    for stage, done in found.stages.items():
        typer.echo(f"{'done' if done else '-':<5} {stage}")
    line = f"trials: {found.trials} of {found.planned} planned"
    if found.rate is not None and found.minutes_left is not None:
        line += f", {found.rate:.1f} a minute, {duration(60 * found.minutes_left)} left"
    if found.last is not None:
        line += f", last {duration(found.last)} ago"
    typer.echo(line)
    for store, claims in found.working.items():
        for claim in claims:
            typer.echo(f"{store}: {claim.key} on {claim.host} (process {claim.pid}), seen {duration(claim.age)} ago")
    if not found.working:
        typer.echo(f"no trial, verification or final row is being measured; last file {duration(found.changed)} ago")
    if found.stopped is not None:
        text = f"stopped {duration(found.stopped.age)} ago: {found.stopped.reason}"
        typer.echo("\n".join(textwrap.wrap(text, 79, subsequent_indent="  ")))


@trials_app.command("export", epilog="Example: quantdm trials export runs/mine trials.json")
def export_command(run_dir: RunFolder, path: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write all finished trials of a run as one file."""
    from quantdm.runs.bundle import export_trials
    from quantdm.runs.run import Run

    typer.echo(f"{counted(export_trials(Run.open(run_dir), path), 'trial')}: {path}")


@trials_app.command("import", epilog="Example: quantdm trials import runs/mine trials.json")
def import_command(run_dir: RunFolder, path: Annotated[Path, typer.Argument(help="File of `trials export`.")]) -> None:
    """Add the trials of such a file to a run of the same pipeline, protocol and options."""
    from quantdm.runs.bundle import import_trials
    from quantdm.runs.run import Run

    typer.echo(f"{import_trials(Run.open(run_dir), path)} new trials in {run_dir}")
