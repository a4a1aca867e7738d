"""Progress bars with an estimate, 79 columns wide, on standard error."""

import sys

from tqdm import tqdm


def bar(total: int, description: str, *, unit: str = "") -> tqdm:
    """Return a progress bar; use it as a context manager and call `update`."""
    return tqdm(
        total=total,
        desc=f"  {description:<28.28}",
        ncols=79,
        file=sys.stderr,
        bar_format="{desc} {bar} {n_fmt}/{total_fmt} {elapsed}<{remaining}" + (f" {unit}" if unit else ""),
        mininterval=0.5,
        dynamic_ncols=False,
        unit_scale=total >= 10**6,
    )
