"""Publish the comparison with peers: the README's table, from eval/results/peers_*.json.

PYTHONPATH=. python eval/publish_peers.py        # after eval/compare_peers.py
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantdm.files import atomic_path, read_json
from quantdm.metrics.statistics import spread
from quantdm.pipelines.known import known_pipelines

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
OURS = ("data-free", "recipe")


def table(record: Mapping[str, Any]) -> str:
    """Return a Markdown table: every peer, and what quantdm has at no more bytes."""
    rows = {row["name"]: row for row in record["rows"]}
    lines = [
        f"| `{record['model']}` | MB | fid_fp | quantdm, data-free | quantdm, recipe |",
        "|---|---|---|---|---|",
    ]
    for peer, limit in sorted(record["within"].items(), key=lambda item: rows[item[0]]["bytes"]):
        ours = [rows[f"quantdm, {kind}, {limit / 1e6:.2f} MB"] for kind in OURS]
        cells = [f"{figure(row)} ({megabytes(row)})" for row in ours]
        lines.append(f"| {peer} | {megabytes(rows[peer])} | {figure(rows[peer])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(row: Mapping[str, Any]) -> str:
    """Return the distance to full precision, mean and standard deviation over draws."""
    return spread(row["fid_fp"], row["fid_fp_sd"], 4)


def megabytes(row: Mapping[str, Any]) -> str:
    """Return the size of a denoiser on disk."""
    return f"{row['bytes'] / 1e6:.2f}"


def main() -> None:
    paths = [ROOT / "eval" / "results" / f"peers_{model}.json" for model in known_pipelines()]
    tables = [table(read_json(path)) for path in paths if path.is_file()]
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text:
        raise SystemExit(f"README.md: has no {BEGIN}, expected one where the table goes")
    block = f"{BEGIN}\n" + "\n\n".join(tables) + f"\n{END}"
    with atomic_path(readme) as temporary:
        temporary.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.S))


if __name__ == "__main__":
    main()
