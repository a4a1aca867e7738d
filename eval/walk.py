"""Walk many kinds of tiny random pipelines the whole way, and write which steps each could take.

python eval/walk.py                      # all kinds that the record does not have yet; then eval/support_matrix.py
python eval/walk.py flux wan-2.2         # these, again
python eval/walk.py --open FOLDER ...    # used by itself: open exports in a new process, as a user would

Each kind is saved, and walked by name: run (search, tune, correct, measure), report, export with its model card, then
in a new process opened by plain diffusers after `import quantdm`, measured against the original, and its card's snippet
executed. Nothing is small but the numbers: every stage of a run is there.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

from quantdm import Scheme, load_protocol  # noqa: E402
from quantdm.corridor.levels import LEVELS, Level  # noqa: E402
from quantdm.corridor.run import run  # noqa: E402
from quantdm.files import load_tensors, read_json, save_tensors, write_json  # noqa: E402
from quantdm.hub.inspection import inspect_target  # noqa: E402
from quantdm.hub.model_card import write_card  # noqa: E402
from quantdm.hub.replace import why_no_export  # noqa: E402
from quantdm.machine import versions  # noqa: E402
from quantdm.metrics.evaluate import evaluate  # noqa: E402
from quantdm.pipelines.generate import generate  # noqa: E402
from quantdm.pipelines.loading import load_pipeline  # noqa: E402
from quantdm.pipelines.parts import find_denoisers  # noqa: E402
from quantdm.report.sections import ROW_NAMES  # noqa: E402
from quantdm.runs.settings import MIN_TRIALS, Effort  # noqa: E402
from quantdm.tuning import TuneSettings  # noqa: E402
from tests.walk_kinds import KINDS, make, protocol_of  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "walk.json"
STEPS = ("inspect", "run", "report", "export", "open", "evaluate", "card")
OPTIONS = tuple(map(Scheme.parse, ("uniform-channel-3", "kmeans-channel-4-feedback", "uniform-channel-8")))
TARGET = 6.0
SEEDS = (11, 12)
LEVEL = Level(MIN_TRIALS, Effort(2, 2, 2, 1, 1, 0), 2, 4, TuneSettings(steps=1, rows=1, every=1), 1)
FRONT = {"license": "apache-2.0", "base_model": "somebody/first", "language": ["en"]}
YES = "yes"


def walk(kind: str, folder: Path) -> dict[str, Any]:
    """Walk one kind up to its model card; return what it is, and step -> yes or why not."""
    source, place = folder / kind, folder / "runs" / kind
    pipe = make(kind)
    pipe.save_pretrained(source)
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(FRONT)}---\n# A tiny {kind}\n", encoding="utf-8")
    protocol = protocol_of(kind)
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(protocol.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    steps: dict[str, str] = {}

    def walked() -> None:
        with _level():
            run(str(source), target_bits=TARGET, run_dir=place, effort="walk", options=OPTIONS,
                protocol=load_protocol(file), workers=1, say=lambda line: None)  # fmt: skip

    _step(steps, "inspect", lambda: _check_inspection(source, pipe))
    _step(steps, "run", walked)
    _step(steps, "report", lambda: _check_report(place))
    _step(steps, "export", lambda: _check_export(place / "export", source))
    _step(steps, "card", lambda: write_card(place / "export", summary=place / "summary.json", source=source))
    found = find_denoisers(pipe)
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,  # pyright: ignore[reportAttributeAccessIssue]
        "denoisers": [type(part).__name__ for part in found.values()],
        "makes": protocol.output or ("video" if "num_frames" in protocol.arguments else "image"),
        "corrected": (place / "correction.safetensors").is_file(),
        "steps": steps,
    }


@contextlib.contextmanager
def _level() -> Any:
    LEVELS["walk"] = LEVEL
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        del LEVELS["walk"]


def _step(steps: dict[str, str], name: str, do: Callable[[], object]) -> None:
    """Take a step, if all before it went well, and note how it went."""
    if any(said != YES for said in steps.values()):
        steps[name] = "not reached"
        return
    try:
        do()
        steps[name] = YES
    except Exception as error:  # every dead end is to be told, whatever it is
        if os.environ.get("WALK_RAISES"):
            raise
        steps[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check_inspection(source: Path, pipe: Any) -> None:
    record = inspect_target(str(source))
    networks = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    shown = {part["name"] for part in record["parts"]}
    assert shown >= networks, f"shows {sorted(shown)} of {sorted(networks)}"


def _check_report(place: Path) -> None:
    page = (place / "report.html").read_text(encoding="utf-8")
    assert 'class="missing"' not in page, f"sections are missing: {re.findall('class=.missing.>(.{80})', page)}"
    rows = [row["name"] for row in read_json(place / "summary.json")["rows"]]
    assert all((ROW_NAMES.get(name) or name) in page for name in rows), "rows are missing in the report"
    assert "quantdm demo" not in page, "the report advises the demo to somebody with an own pipeline"


def _check_export(export: Path, source: Path) -> None:
    parts, original = (
        {name for name, entry in read_json(folder / "model_index.json").items() if isinstance(entry, list)}
        for folder in (export, source)
    )
    assert why_no_export(export) is None, f"would not be replaced: {why_no_export(export)}"
    assert parts == original, f"parts differ: {parts ^ original}"


def open_all(folder: Path, kinds: Iterable[str]) -> dict[str, dict[str, str]]:
    """Take the last steps in a new process; one process serves all kinds."""
    subprocess.run([sys.executable, __file__, "--open", str(folder), *kinds], check=True, timeout=560)
    found = {}
    for kind in kinds:
        steps: dict[str, str] = read_json(folder / f"{kind}-opened.json")
        if steps["open"] == YES:
            again: dict[str, str] = {}
            export = load_pipeline(folder / "runs" / kind / "export")
            _step(again, "open", lambda kind=kind, export=export: _check_same(folder, kind, export))
            steps |= again
        found[kind] = steps
    return found


def _check_same(folder: Path, kind: str, export: Any) -> None:
    here = generate(export, load_protocol(folder / f"{kind}.yaml"), SEEDS)
    there = load_tensors(folder / f"{kind}-opened.safetensors")[0]["images"]
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)  # files put tensors at other places in memory


def opened(folder: Path, kind: str) -> dict[str, str]:
    """Open one export as a user does, measure it, and execute its card's snippet."""
    export, protocol, steps = folder / "runs" / kind / "export", load_protocol(folder / f"{kind}.yaml"), {}
    pipe: Any = None

    def open_() -> None:
        nonlocal pipe
        pipe = DiffusionPipeline.from_pretrained(str(export))
        pipe.set_progress_bar_config(disable=True)
        save_tensors(folder / f"{kind}-opened.safetensors", {"images": generate(pipe, protocol, SEEDS)}, {})

    def measure() -> None:
        figures = evaluate(pipe, protocol=protocol, reference=load_pipeline(folder / kind), num_images=2, seeds=[5])
        assert figures["mean"]["psnr_fp"] is not None, "the export is the original"
        assert figures["mean"]["fid_fp"] >= 0, figures

    _step(steps, "open", open_)
    _step(steps, "evaluate", measure)
    _step(steps, "card", lambda: _execute(export))
    return steps


def _execute(export: Path) -> None:
    """Execute the snippet of a card where the export lies."""
    found = re.search(r"```python\n(.*?)```", (export / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, "no snippet"
    before = Path.cwd()
    os.chdir(export.parent)
    try:
        exec(compile(found[1], f"{export.parent.name}.py", "exec"), {})
    finally:
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="kinds to walk again (none: those that are not in the record)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="a folder to work in and to keep")
    given = parser.parse_args()
    if given.open is not None:
        for kind in given.kinds:
            write_json(given.open / f"{kind}-opened.json", opened(given.open, kind))
        return
    record = read_json(RESULTS) if RESULTS.is_file() else {}
    if record.get("versions") != versions():
        record = {"versions": versions(), "kinds": {}}
    for kind in given.kinds or [kind for kind in KINDS if kind not in record["kinds"]]:
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found = walk(kind, folder)
            if all(said == YES for said in found["steps"].values()):
                found["steps"] |= open_all(folder, [kind])[kind]
        found["steps"] = {step: found["steps"].get(step, "not reached") for step in STEPS}
        found["seconds"] = round(time.monotonic() - start, 1)
        print(kind, json.dumps(found), flush=True)
        known = record["kinds"] | {kind: found}
        record["kinds"] = {name: known[name] for name in KINDS if name in known}
        write_json(RESULTS, record | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
