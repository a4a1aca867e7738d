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
NAMES = {"fd:efficientnet-lite0": "ImageNet features"}
OURS = ("data-free", "recipe")
QUIET = 1.5  # processes that want a core, up to which times are published


def table(record: Mapping[str, Any]) -> str:
    """Return a Markdown table: every peer, and what quantdm has at no more bytes.

    With ImageNet features their distance stands beside that by the classifier's, for the peer and the recipe; with
    times of a quiet machine, milliseconds per step of both, in layers that stay packed.
    """
    rows = {row["name"]: row for row in record["rows"]}
    rulers = [f"fd:{name}" for name in record["rulers"]]
    times = record.get("ms_per_step", {})
    quiet = bool(times) and max(times["load"]) <= QUIET
    head = [f"`{record['model']}`", "MB", "fid_fp", *(f"quantdm, {kind}" for kind in OURS)]
    head += [f"FD with {NAMES.get(key, key)}: {who}" for key in rulers for who in ("peer", OURS[1])]
    head += ["ms per step: peer", OURS[1]] if quiet else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for peer, limit in sorted(record["within"].items(), key=lambda item: rows[item[0]]["bytes"]):
        names = [f"quantdm, {kind}, {limit / 1e6:.2f} MB" for kind in OURS]
        best = rows[names[1]]
        cells = [peer, megabytes(rows[peer]), figure(rows[peer])]
        cells += [f"{figure(rows[name])} ({megabytes(rows[name])})" for name in names]
        cells += [figure(row, key, 3) for key in rulers for row in (rows[peer], best)]
        if quiet:
            both = (times["peers"].get(peer, {}).get("ms"), times[names[1]]["packed"])
            cells += ["-" if ms is None else f"{ms:.1f}" for ms in both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(row: Mapping[str, Any], key: str = "fid_fp", digits: int = 4) -> str:
    """Return a distance to full precision, mean and standard deviation over draws."""
    return spread(row[key], row[f"{key}_sd"], digits)


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
