"""The page: one self-contained HTML file per run directory, readable from disk without a network."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from quantdm.files import MARKUP_COMMENT, check_output, check_replaceable, write_text
from quantdm.report.explanations import allocation, next_bits, sensitivities, surrogates
from quantdm.report.markup import esc
from quantdm.report.noise import noise
from quantdm.report.records import Records, read_records
from quantdm.report.sections import actions, frontier, masthead, model_label, protocol, results, samples
from quantdm.report.tuning import tuning
from quantdm.report.why import unknowns, why

REPORT_FILE = "report.html"
SECTIONS: tuple[tuple[str, str, Callable[[Records], str]], ...] = (
    ("result", "Result", results),
    ("insights", "What to do with it", actions),
    ("samples", "Samples", samples),
    ("frontier", "FID against bits", frontier),
    ("sensitivity", "Sensitivity", sensitivities),
    ("layers", "Bits per layer", allocation),
    ("why", "Why this recipe", why),
    ("next", "What one more bit would buy", next_bits),
    ("unknown", "Names and gaps", unknowns),
    ("surrogates", "Surrogates", surrogates),
    ("tuning", "Tuning", tuning),
    ("noise", "Noise per step", noise),
    ("protocol", "How it was measured", protocol),
)


def write_report(run_dir: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the report of a run directory as one HTML file, atomically, and return its path.

    Style sheet, charts (SVG) and samples (PNG) are inside the file; it loads nothing. Sections whose records are not
    there yet say which command makes them. Equal records give an equal file.

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
    sections = [(key, title, build(records)) for key, title, build in SECTIONS]
    links = " ".join(f'<a href="#{key}">{esc(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{esc(title)}</h2>\n{html}</section>\n' for key, title, html in sections)
    style = resources.files("quantdm.report").joinpath("style.css").read_text(encoding="utf-8")
    title = f"{model_label(records.settings.model)} at {records.settings.target_bits:g} bits: quantdm report"
    write_text(
        path,
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be fetched, whatever a record holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<style>\n{style}</style></head>\n"
        f"<body><header>{masthead(records)}<nav>{links}</nav></header>\n<main>\n{body}</main>\n"
        "<footer>Written by quantdm from the records of one run directory. Point at a mark or a bar to see what it is."
        "</footer>"
        "</body></html>\n",
        MARKUP_COMMENT,
    )
    return path
