"""How commands are listed, and what is said where typer cannot read a value: what was given, what was expected."""

from pathlib import Path
from typing import Any, get_args

import typer
from typer.core import TyperGroup

from quantdm.errors import QuantDMError, message_of

# Title -> commands, in the order in which a user meets them.
PANELS = {
    "Start here": ("inspect", "run", "demo", "apply"),
    "A run, stage by stage": ("search", "bank", "fit", "explain", "select", "tune", "correct", "export"),
    "What came of it": ("status", "report", "evaluate", "generate", "bench"),
    "Files and this machine": ("gguf", "import", "trials", "schema", "doctor"),
}
ORDER = [name for names in PANELS.values() for name in names]
METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}
_EXPECTED = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
}


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

    def invoke(self, ctx: Any) -> Any:
        """Run what was asked for; a value that cannot be read is one line, as all bad input."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            problem = _problem(error)
            if problem is None:
                raise
            raise QuantDMError(problem) from None


def shorten(command: Any) -> None:
    """Name the values of a command's options, and of those below it, by a word instead of their type."""
    for name in getattr(command, "commands", {}):
        shorten(command.commands[name])
    for option in command.params:
        if option.param_type_name == "option" and option.metavar is None:
            kind = bool if option.is_flag else getattr(getattr(option, "type_descriptor", None), "annotation", None)
            kind = next(iter(get_args(kind)), kind)  # of a list, what it is of
            option.metavar = METAVARS.get(kind)


def _problem(error: Any) -> str | None:
    """Return what is wrong with a value in our words, where the error says which value it is."""
    listed = getattr(error.__cause__, "errors", None)
    if listed is None or error.param is None:
        return None
    problem = listed()[0]
    name = max(error.param.opts, key=len)
    own = problem.get("ctx", {}).get("error")
    if isinstance(own, QuantDMError):
        return f"{name}: {own}"
    expected = _EXPECTED.get(problem["type"])
    if expected is None:
        return f"{name}: got {problem['input']!r}: {message_of(problem)}"
    return f"{name}: got {problem['input']}, expected {expected.format(**problem.get('ctx', {}))}"
