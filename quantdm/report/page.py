"""The page: one self-contained HTML file per run directory, readable from disk without a network."""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from quantdm.files import MARKUP_COMMENT, check_output, check_replaceable, write_text
from quantdm.report.ablation import ablation
from quantdm.report.atlas import atlas
from quantdm.report.data import report_data
from quantdm.report.explanations import allocation, next_bits, sensitivities, surrogates
from quantdm.report.frontier import frontier
from quantdm.report.markup import esc
from quantdm.report.noise import noise
from quantdm.report.paste import markdown
from quantdm.report.paths import paths
from quantdm.report.records import Records, read_records
from quantdm.report.samples import samples
from quantdm.report.sections import actions, masthead, protocol, results
from quantdm.report.split import split
from quantdm.report.theme import variables
from quantdm.report.tuning import tuning
from quantdm.report.why import unknowns, why
from quantdm.report.wording import model_label

REPORT_FILE = "report.html"
SECTIONS: tuple[tuple[str, str, Callable[[Records], str]], ...] = (
    ("samples", "Samples", samples),
    ("result", "Result", results),
    ("split", "Part by part", split),
    ("insights", "What to do with it", actions),
    ("frontier", "Quality against size", frontier),
    ("map", "Map", atlas),
    ("layers", "Bits per layer", allocation),
    ("sensitivity", "Sensitivity", sensitivities),
    ("why", "Why this recipe", why),
    ("paths", "Which path carries the damage", paths),
    ("next", "What one more bit would buy", next_bits),
    ("unknown", "Names and gaps", unknowns),
    ("surrogates", "Surrogates", surrogates),
    ("tuning", "Tuning", tuning),
    ("ablation", "Activations and correction", ablation),
    ("noise", "Noise per step", noise),
    ("protocol", "How it was measured", protocol),
)
STYLES = ("style.css", "pictures.css")
SCRIPTS = ("compare.js", "tips.js", "page.js")


def write_report(run_dir: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the report of a run directory as one HTML file, atomically, and return its path.

    Style sheet, script, pictures (SVG), samples (PNG) and all numbers (JSON) are inside the file; it loads nothing.
    Sections whose records are not there yet are folded away at the end, with the command that makes them. Equal records
    give an equal file.

    Args:
        run_dir: a run directory; only its run.json is required.
        out: where to write (None: report.html in the run directory).

    Raises:
        QuantDMError: no run there, a record that is damaged or of another version, or a file at `out` that is no
            report as quantdm wrote it.
    """
    path = Path(run_dir) / REPORT_FILE if out is None else Path(out)
    records = read_records(run_dir)
    check_replaceable(check_output(path))
    built = [(key, title, build(records)) for key, title, build in SECTIONS]
    sections = [section for section in built if section[2]]  # what does not concern this run is not there at all
    there = [section for section in sections if not _is_missing(section[2])]
    there.append(("take", "Take it along", _take(records)))
    title = f"{model_label(records.settings.model)} at {records.settings.target_bits:g} bits: quantdm report"
    absent = _absent([section for section in sections if _is_missing(section[2])])
    text = whole_page(title, masthead(records), there, absent, report_data(records))
    write_text(path, text, MARKUP_COMMENT)
    return path


def whole_page(
    title: str, header: str, sections: Sequence[tuple[str, str, str]], after: str, data: dict[str, Any]
) -> str:
    """Return a page: `header`, sections of (id, title, HTML), what comes after them, and the data."""
    links = " ".join(f'<a href="#{key}">{esc(name)}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{esc(name)}</h2>\n{html}</section>\n'
        for key, name, html in sections
    )
    script = "\n".join(_read(name) for name in SCRIPTS)
    # Nothing may be fetched, and no script runs but this one, whatever a record holds.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    content = (
        f'<header>{header}<nav aria-label="Sections">{links}</nav></header>\n<main id="main">\n{body}{after}</main>'
    )
    style = "\n".join(_read(name) for name in STYLES) + variables(content)
    packed = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<style>\n{style}</style></head>\n<body><a class="skip" href="#main">Skip to the content</a>\n{content}\n'
        "<footer>Written by quantdm from records alone; it fetches nothing.</footer>\n"
        f'<script type="application/json" id="data">{packed}</script>\n<script>{script}</script></body></html>\n'
    )


def _read(name: str) -> str:
    return resources.files("quantdm.report").joinpath(name).read_text(encoding="utf-8")


def _is_missing(html: str) -> bool:
    """Whether a section says nothing but that its record is not there."""
    return html.startswith('<p class="missing') and html.count("<p") == 1


def _absent(sections: Sequence[tuple[str, str, str]]) -> str:
    """Fold away what a run has no record of."""
    if not sections:
        return ""
    items = "".join(f'<div id="{key}"><h3>{esc(title)}</h3>{html}</div>' for key, title, html in sections)
    return (
        '<section id="absent" aria-labelledby="absent-title"><h2 id="absent-title">Not in this run yet</h2>'
        f"<details><summary>{len(sections)} sections and the commands that make them</summary>{items}</details>"
        "</section>\n"
    )


def _take(records: Records) -> str:
    """Return the Markdown to paste and the way to the data."""
    return (
        "<p>The result as Markdown, and everything on this page as JSON (also: <code>quantdm report RUN_DIR "
        "--json</code>).</p>"
        '<p class="buttons" hidden><button type="button" class="copy">Copy the Markdown</button> '
        '<button type="button" class="save">Save the data as JSON</button> <span aria-live="polite"></span></p>'
        f'<details><summary>Markdown</summary><pre id="markdown" tabindex="0">{esc(markdown(records))}</pre></details>'
    )
