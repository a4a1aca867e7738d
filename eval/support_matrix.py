"""Write docs/support.md: what the tests cover, from a report of a real test run; which kinds of pipelines were walked
the whole way; which classes are traced.

python eval/trace_matrix.py
python eval/walk.py
python -m pytest tests/test_families.py tests/test_lora.py tests/test_offload.py --junitxml=report.xml
python eval/support_matrix.py report.xml
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from quantdm.files import atomic_path, read_json

ROOT = Path(__file__).resolve().parents[1]
TRACE_MATRIX = ROOT / "eval" / "results" / "trace_matrix.json"
WALK = ROOT / "eval" / "results" / "walk.json"
# Column -> the test functions that stand behind it; a test id begins with the family's name.
COLUMNS = {
    "fp32": (r"test_an_export_opened.*-fp32-",),
    "bf16": (r"test_an_export_opened.*-bf16-",),
    "shards": (r"test_an_export_opened.*-shards",),
    "LoRA": (r"test_a_lora_changes", r"test_fusing_is_refused", r"test_gradients_reach"),
    "offload": (r"test_an_offloaded_model",),
    "compile": (r"test_a_compiled_model",),
    "autocast": (r"test_autocast",),
}
PAGE = """# Support

Written by `eval/support_matrix.py` from the report of a test run: `yes` means that every test of that cell passed, with
tiny real instances of the class (random weights) in which three methods are mixed at 2 to 8 bits; `-` means that it was
not tried on that class. *fp32*, *bf16*, *shards*: applied, saved, opened in a new process, outputs equal bit by bit.

{table}

Pipelines with DDIM, Euler, DPM-Solver++ and flow-matching schedulers, and pipelines under model and group offload,
answer as the one with the decoded weights. Nothing in quantdm names a class: what is not in the table works if its
layers can be listed, which `quantdm inspect` tells in seconds.
On a GPU: the test suite ran once on an NVIDIA H200 (torch 2.11, transformers 5.17, Python 3.12), with the embedded
pipelines on it. None of its 4,690 tests met a wrong number; 28 failed and 43 could not start for other reasons (Ray
was not installed, inputs of tests lay on the processor, an older typer, classes that diffusers lists and cannot
import), which were mended afterwards, not run there again. `quantdm run digits-dit --effort quick --target-bits 3`
walked the whole way there; 1,000 images of 20 steps take 1.1 to 1.5 s. Since then packed weights are decoded on a
GPU by one kernel: it has run in Triton's interpreter only, bit by bit as the eager path, and asks itself on every
device for a known result before it is used. Streams, CUDA offload and the speed of packed weights on a GPU are not
measured (`eval/bench_cuda.py` does where there is one).

## Which kinds of pipelines walk the whole way

<!-- walk:begin -->
{walked}
<!-- walk:end -->

## Which classes are traced

{traces}
"""
WALKED = """Written from the results of `eval/walk.py` ({date}, diffusers {diffusers}, torch {torch}): {kinds} kinds of
tiny pipelines with random weights, each with its own scheduler. Every stage of `quantdm run` was there, with few images
and steps. *open*: plain diffusers in a new process, after `import quantdm`, makes the same images; *card*: the snippet
of the model card runs there. *corrected*: whether the sampler's correction serves its scheduler; where it does not, the
run says so and goes on.

{table}{reasons}"""
TRACES = """Written from the results of `eval/trace_matrix.py` ({date}, diffusers {diffusers}, torch {torch}): every
transformer, U-Net and ControlNet class that diffusers exports, and every other one whose forward takes a noise level.
**{traced} of these {count} classes are traced** from class and configuration alone, with default configurations of
fewer layers (completed where a default is no working model). {lists} of the others are mere lists of models; of those
that are models themselves, it is {traced} of {single}, or {share:.1f} %. Not traced, and why:

{reasons}

Some forwards leave layers out, which then stand in the graph without data flow:
{idle}.

Where the inputs of a denoiser cannot be told, one call of its pipeline tells them: `quantdm.capture_inputs`."""


def table(cases: Mapping[str, bool]) -> str:
    """Return the table of a test run: test name with its id in brackets -> whether it passed."""
    families = [m[1] for name in cases if (m := re.fullmatch(r"test_an_export_opened.*\[(.+)-fp32-whole\]", name))]
    rows = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for family in families:
        own = {name: passed for name, passed in cases.items() if re.search(rf"\[{re.escape(family)}(-|\])", name)}
        cells = []
        for patterns in COLUMNS.values():
            results = [passed for name, passed in own.items() if any(re.match(pattern, name) for pattern in patterns)]
            cells.append("-" if not results else "yes" if all(results) else "**no**")
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(rows)


def traces(record: Mapping[str, Any]) -> str:
    """Return the section on traced classes from the record of `eval/trace_matrix.py`."""
    classes = record["classes"]
    reasons: dict[str, list[str]] = {}
    for name, found in classes.items():
        if not found["traced"]:
            reasons.setdefault(found["reason"], []).append(f"`{name}`")
    traced, lists = sum(found["traced"] for found in classes.values()), sum(found["list"] for found in classes.values())
    idle = [
        f"`{name}` ({found['layers'] - found['reached']} of {found['layers']})"
        for name, found in classes.items()
        if found["traced"] and found["reached"] < found["layers"]
    ]
    single = len(classes) - lists
    return TRACES.format(
        date=record["date"],
        **record["versions"],
        count=len(classes),
        lists=lists,
        traced=traced,
        single=single,
        share=100 * traced / single,
        reasons="\n".join(f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()),
        idle=", ".join(idle),
    )


def walked(record: Mapping[str, Any]) -> str:
    """Return the section on whole walks from the record of `eval/walk.py`."""
    kinds = record["kinds"]
    steps = list(next(iter(kinds.values()))["steps"])
    rows = ["| | pipeline | scheduler | corrected | " + " | ".join(steps) + " |", "|---|" + "---|" * (len(steps) + 3)]
    reasons = []
    for kind, found in kinds.items():
        cells = ["yes" if found["steps"][step] == "yes" else "**no**" for step in steps]
        reasons += [f"- {kind}, {step}: {said}" for step, said in found["steps"].items() if said != "yes"]
        corrected = "yes" if found["corrected"] else "no"
        rows.append(f"| {kind} | {found['pipeline']} | {found['scheduler']} | {corrected} | {' | '.join(cells)} |")
    return WALKED.format(
        date=record["date"],
        **{name: record["versions"][name] for name in ("diffusers", "torch")},
        kinds=len(kinds),
        table="\n".join(rows),
        reasons="".join(f"\n{line}" for line in ["", *reasons] if reasons),
    )


def page(cases: Mapping[str, bool]) -> str:
    """Return the whole page for the cases of a test run."""
    return PAGE.format(table=table(cases), walked=walked(read_json(WALK)), traces=traces(read_json(TRACE_MATRIX)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    cases = {
        case.attrib["name"]: not any(child.tag in ("failure", "error", "skipped") for child in case)
        for case in ElementTree.parse(parser.parse_args().report).iter("testcase")
    }
    with atomic_path(ROOT / "docs" / "support.md") as temporary:
        temporary.write_text(page(cases), encoding="utf-8")


if __name__ == "__main__":
    main()
