"""How commands are listed, and what is said where typer cannot read a value: what was given, what was expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from quantdm.errors import QuantDMError

# Title -> commands, in the order in which a user meets them.
PANELS = {
    "Start here": ("inspect", "run", "demo", "apply"),
    "A run, stage by stage": ("search", "bank", "fit", "explain", "select", "tune", "correct", "export"),
    "What came of it": ("status", "report", "evaluate", "generate", "bench"),
    "Files and this machine": ("gguf", "import", "trials", "schema", "doctor"),
}
ORDER = [name for names in PANELS.values() for name in names]
METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}
_EXPECTED = {int: "a whole number", float: "a number"}


class Declared(NamedTuple):
    """What the function of a command says of one of its options."""

    kind: Any  # of a value; of each where there are several
    info: OptionInfo | None


class Commands(TyperGroup):
    """The commands in panels; values of options are named by one short word."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, as a user meets them."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, with the panel that it is listed in."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = next((title for title, names in PANELS.items() if cmd_name in names), None)
            shorten(command)
        return command


def shorten(command: Any) -> None:
    """Name the values of a command's options, and of those below it, by a word; say in our words which cannot be read.

    What is said of an option is looked up in the command's function: how typer keeps it differs by its version.
    """
    for name in getattr(command, "commands", {}):
        shorten(command.commands[name])
    if "get_help_option" not in vars(command):
        command.get_help_option = _without_value(command.get_help_option)
    said = _declared(command.callback)
    for option in command.params:
        if option.param_type_name != "option" or "process_value" in vars(option):  # or it was shortened before
            continue
        declared = said.get(option.name, Declared(None, None))
        if option.metavar is None:
            option.metavar = METAVARS.get(bool if option.is_flag else declared.kind)
        option.process_value = _reader(max(option.opts, key=len), declared, option.process_value)


def _without_value(get: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what gives the help option, which typer would list as one with a value."""

    def get_help_option(ctx: Any) -> Any:
        option = get(ctx)
        if option is not None:
            option.metavar = ""
        return option

    return get_help_option


def _declared(function: Callable[..., Any] | None) -> dict[str, Declared]:
    """Return what the function of a command says of its options, by their names."""
    found = {}
    for name, kind in (get_type_hints(function, include_extras=True) if function else {}).items():
        info = next((note for note in getattr(kind, "__metadata__", ()) if isinstance(note, OptionInfo)), None)
        while inner := get_args(kind):  # of Annotated, of "or None" and of a list
            kind = inner[0]
        found[name] = Declared(kind, info)
    return found


def _reader(name: str, declared: Declared, read: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return what reads an option's value; one that cannot be read is one line, as all bad input."""

    def process_value(ctx: Any, value: Any) -> Any:
        try:
            return read(ctx, value)
        except typer.BadParameter as error:
            if not isinstance(value, str):  # it is missing
                raise
            raise QuantDMError(f"{name}: {_problem(value, declared) or f'got {value!r}: {error.message}'}") from None

    return process_value


def _problem(value: str, declared: Declared) -> str | None:
    """Return what is wrong with a value in our words; None: there are none for it."""
    kind, info = declared
    if info is not None and info.parser is not None:
        try:
            info.parser(value)
        except QuantDMError as error:
            return str(error)
    if kind not in _EXPECTED:
        return None
    try:
        number = kind(value)
    except ValueError:
        return f"got {value}, expected {_EXPECTED[kind]}"
    if info is not None and info.min is not None and not number >= info.min:
        return f"got {value}, expected {info.min} or more"
    if info is not None and info.max is not None and not number <= info.max:
        return f"got {value}, expected {info.max} or less"
    return None
