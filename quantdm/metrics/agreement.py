"""Do two rulers order the same rows alike? Rank correlations of figures over rows."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from scipy import stats

from quantdm.errors import QuantDMError


def rank_agreement(
    figures: Mapping[str, Sequence[float]], *, higher: Sequence[str] = ()
) -> dict[str, dict[str, float | int | None]]:
    """Return, per pair of rulers, how alike they order the rows.

    Args:
        figures: ruler -> one figure per row, the same rows everywhere.
        higher: the rulers of which more is better; of all others less is.

    Returns:
        "a / b" -> spearman and kendall (None where a ruler sees no difference between any rows), and how many pairs of
        rows they order differently, of how many.

    Raises:
        QuantDMError: fewer than three rows, or rulers of different rows.
    """
    counts = {len(values) for values in figures.values()}
    if len(counts) != 1 or min(counts) < 3:
        raise QuantDMError(f"rulers: got {sorted(counts)} rows, expected the same three or more for every ruler")
    signed = {name: [-v if name in higher else v for v in values] for name, values in figures.items()}
    found: dict[str, dict[str, float | int | None]] = {}
    for (a, x), (b, y) in combinations(signed.items(), 2):
        pairs = list(combinations(range(len(x)), 2))
        flat = len(set(x)) == 1 or len(set(y)) == 1
        found[f"{a} / {b}"] = {
            "spearman": None if flat else float(stats.spearmanr(x, y)[0]),  # pyright: ignore[reportArgumentType]
            "kendall": None if flat else float(stats.kendalltau(x, y)[0]),  # pyright: ignore[reportArgumentType]
            "differently": sum((x[i] - x[j]) * (y[i] - y[j]) < 0 for i, j in pairs),
            "pairs": len(pairs),
        }
    return found
