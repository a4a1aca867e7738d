"""The application, and the arguments that several sub-commands share."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quantdm.cli.given import options_given, pipeline_given, protocol_given, run_given
from quantdm.cli.group import Commands
from quantdm.errors import QuantDMError
from quantdm.schemes import Scheme

OLDER_NAMES = {  # of options, and longer ones, which help does not show twice
    "target-bytes": "target-size", "target-pipeline-size": "pipeline-size",
}  # fmt: skip

app = typer.Typer(
    name="quantdm",
    cls=Commands,
    help="Make a diffusion pipeline small: where precision is worth its bits, in a size you name.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: OLDER_NAMES.get(name, name)},
)


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no circles of garbage: what a short command imports and opens lives until it ends.

    Where so much is imported, the search for them takes a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _show_version(asked: bool) -> None:
    if asked:
        from quantdm import __version__

        typer.echo(f"quantdm {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    pass


UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SEARCH, MACHINE = "What is searched", "Where it is computed"  # panels of options


def size_in_bytes(text: str) -> int:
    """Read a size: a number of bytes, or one with a unit of UNITS, e.g. 1.2GB.

    Raises:
        QuantDMError: neither, or nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = next((u for u in UNITS if match and u.lower() in (match[2].lower(), f"{match[2].lower()}b")), None)
    size = int(float(match[1]) * UNITS[unit]) if match and unit else 0
    if size < 1:
        raise QuantDMError(f"size: got {text!r}, expected bytes or a number with {', '.join(UNITS)}, such as 1.2GB")
    return size


Model = Annotated[
    str,
    typer.Argument(
        callback=pipeline_given, help="Embedded pipeline (digits-dit, digits-flow, digits-sd), directory or hub id."
    ),
]
RunDir = Annotated[Path, typer.Option("--run-dir", help="Run directory: every stage leaves its record there.")]
BegunRun = Annotated[
    Path, typer.Option("--run-dir", callback=run_given, help="Run directory: every stage leaves its record there.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
TargetBits = Annotated[float | None, typer.Option(help="Average bits per weight, overhead included.")]
TargetBytes = Annotated[
    int | None,
    typer.Option(
        "--target-size",
        parser=size_in_bytes,
        metavar="SIZE",
        help="Or the size of the denoiser on disk: bytes, or e.g. 1.2GB.",
    ),
]
TargetPipelineBytes = Annotated[
    int | None,
    typer.Option(
        "--pipeline-size",
        parser=size_in_bytes,
        metavar="SIZE",
        help="Or that of all parts on disk, e.g. 6GB: text encoders and VAE get what suits them, measured.",
    ),
]
EffortName = Annotated[str, typer.Option("--effort", help="quick, normal or thorough.")]
Trials = Annotated[
    int | None,
    typer.Option(min=30, help="Measured configurations (default: the effort's).", rich_help_panel=SEARCH),
]
Options = Annotated[
    str | None,
    typer.Option(
        callback=options_given,
        metavar="A,B,...",
        help="Schemes that every layer may take (default: the effort's).",
        rich_help_panel=SEARCH,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes (default: one per core, or per accelerator).", rich_help_panel=MACHINE),
]
BatchSize = Annotated[
    str,
    typer.Option(
        metavar="N",
        help="Images at once at most; auto: found from memory. Halved where memory runs out.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where the pipeline is put: cpu, cuda, mps (default: cuda if any).",
        rich_help_panel=MACHINE,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Images are made in bfloat16, float16 or float32 (default: what is fast here).",
        rich_help_panel=MACHINE,
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine", metavar="NAME", help="What measures: local, or ray (docs/cluster.md).", rich_help_panel=MACHINE
    ),
]
Fidelity = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="full: every trial by its images (default); auto: most by a cheap label, if it ranks alike.",
        rich_help_panel=SEARCH,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Of a Ray cluster: auto, HOST:6379, ray://HOST:10001 (default: one here).", rich_help_panel=MACHINE
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Determines every sampled configuration and noise.", rich_help_panel=SEARCH)
]
ProtocolFile = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        callback=protocol_given,
        metavar="FILE",
        help="What images to measure on: YAML file, or e.g. text-to-image-64 (docs/protocol.md).",
    ),
]
LearnedFrom = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="RUN",
        help="Run directory of another model, whose trials say where to look first; may be repeated.",
        rich_help_panel=SEARCH,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="PATTERN=SCHEME on top of the recipe; may be repeated, last wins.")
]
ModelCard = Annotated[bool, typer.Option("--model-card", help="Also write README.md: ready for the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Variant = Annotated[str | None, typer.Option(help="Of the weight files, e.g. fp16, where there are others too.")]
Config = Annotated[
    Path | None,
    typer.Option(help="Of a single safetensors file: directory of a pipeline or denoiser of its kind, or config.json."),
]
ExampleInputs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="YAML: the arguments of one call of the denoiser, where they cannot be inferred.",
    ),
]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what every stage would take of time, memory and disk; start nothing.")
]
Embeddings = Annotated[
    str,
    typer.Option(
        metavar="SCHEME",
        help="Of embedding tables, which are not searched; original: as they are.",
        rich_help_panel=SEARCH,
    ),
]


def table_scheme(label: str) -> Scheme | None:
    """Read the scheme of `--embeddings`."""
    return None if label == "original" else Scheme.parse(label)


def given_inputs(path: Path | None) -> dict[str, Any] | None:
    """Read the file of `--example-inputs`, if there is one."""
    from quantdm.denoisers.given_inputs import read_inputs

    return None if path is None else read_inputs(path)


def batch_size_of(text: str) -> int | Literal["auto"]:
    """Read `--batch-size`.

    Raises:
        QuantDMError: neither auto nor a number of images.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not int(text):
        raise QuantDMError(f"batch size: got {text!r}, expected auto, or 1 image or more")
    return int(text)
