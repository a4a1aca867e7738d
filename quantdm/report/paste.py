"""The result as Markdown: to paste into a model card, an issue or a chat."""

from typing import Any

from quantdm.report.glance import answers
from quantdm.report.records import Records
from quantdm.report.sections import draws_of
from quantdm.report.wording import guidance, megabytes, model_label, plus_minus

COLUMNS = (("Row", "---"), ("Bits", "--:"), ("Denoiser", "--:"), ("fid_fp", "--:"), ("PSNR", "--:"))


def markdown(records: Records) -> str:
    """Return the three answers, the result rows and their protocol as Markdown."""
    settings, summary = records.settings, records.summary or {}
    title = f"### {_plain(model_label(settings.model))} at {settings.target_bits:.2f} bits per weight (quantdm)"
    lines = [title, "", *(f"- **{a.question}** {_plain(a.sentence)}" for a in answers(records))]
    if records.rows:
        real = "fid_real" in next(iter(records.rows.values()))
        counted = len(draws_of(summary.get("rows", []))) > 1
        columns = (*COLUMNS, *[("fid_real", "--:")] * real, *[("Draws", "--:")] * counted)
        lines += ["", "| " + " | ".join(name for name, _ in columns) + " |"]
        lines.append("|" + "|".join(rule for _, rule in columns) + "|")
        lines += ["| " + " | ".join(_cells(row, real, counted)) + " |" for row in records.rows.values()]
        protocol = summary.get("protocol", {})
        lines += [
            "",
            f"{protocol.get('images', 0):,} images per draw, draws {', '.join(map(str, protocol.get('draws', [])))}, "
            f"{protocol.get('steps')} steps, guidance {guidance(protocol.get('guidance_scale'))}; fid_fp: distance to "
            f"full precision on equal noises, {_plain(str(protocol.get('features')))} features, mean ± standard "
            "deviation over draws.",
        ]
        if summary.get("versions"):
            lines += ["", ", ".join(f"{_plain(name)} {_plain(v)}" for name, v in summary["versions"].items())]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], real: bool, counted: bool) -> list[str]:
    psnr = row.get("psnr_fp")
    cells = [
        row["name"],
        f"{row['avg_bits']:.3f}",
        megabytes(row["denoiser_bytes"]),
        plus_minus(row) if row["fid_fp"] > 1e-9 else "0",
        "–" if psnr is None else f"{psnr:.1f}",
        *([plus_minus(row, "fid_real")] if real else []),
        *([str(row.get("draws", "–"))] if counted else []),
    ]
    return [_plain(cell) for cell in cells]


def _plain(text: str) -> str:
    """Return text that breaks no table and no line."""
    return " ".join(text.replace("\u00a0", " ").replace("|", "\\|").split())
