"""The insights of a run as files beside its report: charts and the coloured graph as SVG, everything as one JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdm.errors import QuantDMError
from quantdm.files import MARKUP_COMMENT, check_replaceable, write_json, write_text
from quantdm.report import charts, layer_charts
from quantdm.report.advice import advice, cheapest_savings, doubts, read_names, say_names, shared_schemes
from quantdm.report.drawing import draw_graph
from quantdm.report.explanations import ordered_groups
from quantdm.report.insights import Group, group_layers, insights, one_more_bit, width_value, widths
from quantdm.report.published import compare_published, say_published
from quantdm.report.records import MADE_BY, Records, read_records
from quantdm.surrogates import SearchSpace

Floats = NDArray[np.float64]
FOLDER, RECORD, INSIGHTS_VERSION = "insights", "insights.json", 1
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the distribution over a group's layers: range, quartiles, median


def save_insights(run_dir: str | Path) -> list[Path]:
    """Write what a run teaches into RUN_DIR/insights and return the paths; equal records give equal files.

    insights.json holds three sentences to act on, where one more bit buys most, and per operation type and block the
    distribution of one-layer errors and learned values, the bits and the chosen schemes. The SVG files show the same:
    box plots per operation type and block, methods and bits per operation type and per layer, and the data-flow graph
    coloured by bits and by what more bits are worth.

    Raises:
        QuantDMError: no run there, its search space, recipe or attributions are not made yet, or a file of
            the same name there is not as quantdm wrote it.
    """
    records = read_records(run_dir)
    space, choice, explanation = records.space, records.choice, records.explanation
    if space is None or choice is None or explanation is None:
        lacking = "space.json" if space is None else "recipe.yaml" if choice is None else "attribution.json"
        raise QuantDMError(f"insights: {lacking} is missing in {run_dir}; make it with `{MADE_BY[lacking]}`")
    source, values = explanation[0], explanation[1].values
    learned = width_value(space, values)
    folder = Path(run_dir) / FOLDER
    drawings = _drawings(space, choice, values, learned)
    bits = space.gather(space.bits, choice)[0] / space.num_weights
    narrow, wide = widths(space)[0], widths(space)[-1]
    graphs = {
        "graph_bits.svg": (bits, "bits per weight of the recipe, all counted"),
        "graph_worth.svg": (learned, f"worth of {wide} instead of {narrow} bits in −log FID ({source} surrogate)"),
    }
    for name in (*drawings, *graphs):
        check_replaceable(folder / name)
    for name, svg in drawings.items():
        write_text(folder / name, svg, MARKUP_COMMENT)
    for name, (per_layer, label) in graphs.items():
        colours = dict(zip(space.layer_names, per_layer.tolist(), strict=True))
        draw_graph(space.graph, values=colours, label=label, path=folder / name)
    record = {
        "version": INSIGHTS_VERSION,
        "model": records.settings.model,
        "source": source,
        "sentences": sentences_of(records),
        "names": asdict(read_names(space, values)),
        "one_bit_less": [asdict(step) for step in cheapest_savings(space, values, choice)],
        "shared_schemes": [asdict(item) for item in shared_schemes(space, values, choice)],
        "published": [asdict(item) for item in compare_published(space, values)],
        "doubts": [asdict(item) for item in doubts(space, explanation[1], choice)],
        "one_more_bit": [asdict(step) for step in one_more_bit(space, values, choice)],
        "by_op_type": [_row(space, choice, learned, group) for group in group_layers(space, "op_type", choice)],
        "by_block": [_row(space, choice, learned, group) for group in group_layers(space, "block", choice)],
    }
    write_json(folder / RECORD, record)
    return [folder / name for name in (RECORD, *drawings, *graphs)]


def sentences_of(records: Records) -> list[str]:
    """Return every sentence to act on, and what names are worth; none where the run has no recipe or explanation."""
    space, choice, explanation = records.space, records.choice, records.explanation
    if space is None or choice is None or explanation is None:
        return []
    attribution = explanation[1]
    names = read_names(space, attribution.values)
    published = say_published(space, attribution.values)
    return [
        *insights(space, choice, attribution.values),
        *advice(space, attribution, choice),
        say_names(names),
        *([] if published is None else [published]),
    ]


def _drawings(space: SearchSpace, choice: NDArray[np.int64], values: Floats, learned: Floats) -> dict[str, str]:
    """Return file name -> SVG of every chart."""
    return {
        **{
            f"sensitivity_per_{by}.svg": layer_charts.sensitivity(space, ordered_groups(space, by)[0], learned, title)
            for by, title in (("op_type", "operation type"), ("block", "block"))
        },
        "methods.svg": charts.methods(space, values),
        "bits_per_op_type.svg": layer_charts.shares_per_type(space, choice),
        "bits_per_layer.svg": layer_charts.bits_per_layer(space, choice),
    }


def _row(space: SearchSpace, choice: NDArray[np.int64], learned: NDArray[np.float64], group: Group) -> dict[str, Any]:
    """Return the figures of one group of layers: quantiles over its layers, shares of its weights."""
    error = {
        label: np.quantile(space.noise_error[group.members, option], SHARES).tolist()
        for option, label in enumerate(space.labels)
    }
    weights, taken = space.num_weights[group.members], choice[group.members]
    schemes = {
        space.labels[option]: float(weights[taken == option].sum() / weights.sum())
        for option in np.unique(taken).tolist()
    }
    return {
        "name": group.name,
        "layers": len(group.members),
        "weight_share": group.weight_share,
        "avg_bits": group.avg_bits,
        "bit_share": group.bit_share,
        "schemes": schemes,
        "noise_error_quantiles": error,
        "worth_quantiles": np.quantile(learned[group.members], SHARES).tolist(),
    }
