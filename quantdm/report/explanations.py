"""Why it came out so: sensitivities, bits per layer, the next bit, surrogates."""

import numpy as np

from quantdm.errors import counted
from quantdm.report import charts, insights, layer_charts
from quantdm.report.figures import FLOOR, describe
from quantdm.report.insights import Group
from quantdm.report.markup import dotted, esc, figure, missing, paragraph, table
from quantdm.report.meters import Meter, dots
from quantdm.report.records import Records
from quantdm.report.wording import megabytes, percent
from quantdm.runs.cheap import told
from quantdm.surrogates import SearchSpace

MAX_GROUPS = 40  # rows of a chart that one still reads


def sensitivities(records: Records) -> str:
    """Return the box plots per operation type and per block, and the methods beside each other."""
    space = records.space
    if space is None:
        return missing("space.json", "No sensitivities")
    values, source = None, ""
    if records.explanation is not None:
        source, attribution = records.explanation
        values = attribution.values
    learned = None if values is None else insights.width_value(space, values)
    right = "" if learned is None else f" Right: what the {source} surrogate learned from {len(records.trials)} trials."
    clipped = space.felt_error.min() < FLOOR * space.noise_error.max()
    floor = " (errors below a millionth of the largest are drawn there)" if clipped else ""
    html = ""
    for by, title in (("op_type", "operation type"), ("block", "block")):
        groups, order = ordered_groups(space, by)
        caption = (
            f"Boxes span the quartiles over the layers of one {title}, lines their range, the dark tick is the median; "
            f"{order}. Left: relative squared error of the denoiser's output when a single layer is quantized, on "
            f"full-precision trajectories of {records.settings.noise_images} images at middle timesteps{floor}.{right}"
        )
        svg, slim = (layer_charts.sensitivity(space, groups, learned, title, narrow=n) for n in (False, True))
        html += f"<h3>Per {title}</h3>" + figure(svg, "Where precision is worth its bits.", caption, narrow=slim)
    caption = (
        "Left: median over all layers of the one-layer error, against what each method really costs with its codebooks "
        f"and scales.{'' if values is None else f' Right: mean value under the {source} surrogate.'}"
    )
    html += "<h3>Per method</h3>" + figure(
        charts.methods(space, values), "What each method gives for its bits.", caption,
        narrow=charts.methods(space, values, narrow=True),
    )  # fmt: skip
    if values is None:
        html += missing("attribution.json", "What the surrogates learned is not shown")
    return html


def ordered_groups(space: SearchSpace, by: str) -> tuple[list[Group], str]:
    """Return the groups of layers by `op_type` or `block` as a chart shows them, and a phrase that says the order."""
    groups, width = insights.group_layers(space, by), insights.widths(space)[0]
    error = insights.least_error(space, width)
    order = "in data-flow order"
    if by == "op_type":
        groups = sorted(groups, key=lambda g: -float(np.median(error[g.members])))
        order = f"most sensitive at {width}\u00a0bits on top"
    if len(groups) > MAX_GROUPS:
        keep = sorted(groups, key=lambda g: -float(error[g.members].max()))[:MAX_GROUPS]
        order += f"; the {MAX_GROUPS} of {len(groups)} with the most sensitive layers"
        groups = [group for group in groups if group in keep]
    return groups, order


def allocation(records: Records) -> str:
    """Return bits per layer and the shares per operation type, with the list of all layers."""
    space, choice = records.space, records.choice
    if space is None:
        return missing("space.json", "No layers")
    if choice is None:
        return missing("recipe.yaml", "No recipe")
    html = figure(
        layer_charts.bits_per_layer(space, choice),
        "Bits per layer.",
        f"All {counted(len(space.layers), 'layer')} in data-flow order. Above: bits of the codes, coloured by method. "
        "Below: the error of the output that this layer alone causes with the option it got. The table below has "
        "their names.",
        narrow=layer_charts.bits_per_layer(space, choice, narrow=True),
    )
    html += figure(
        layer_charts.shares_per_type(space, choice),
        "Method and bits per operation type.",
        "Share of each operation type's weights that got each option; beside it its average bits (codebooks and scales "
        "included), its share of all weights and its share of all bits.",
        narrow=layer_charts.shares_per_type(space, choice, narrow=True),
    )
    error, bits = space.gather(space.noise_error, choice)[0], space.gather(space.bits, choice)[0]
    rows = []
    for p in np.argsort([layer.index for layer in space.layers], kind="stable"):
        layer = space.layers[p]
        cells = [
            dotted(layer.name),
            f"{layer.num_weights:,}",
            esc(describe(space.labels[choice[p]])),
            f"{bits[p] / layer.num_weights:.3f}",
            percent(float(error[p])),
        ]
        rows.append(("", cells))
    head = [("Layer", ""), ("Weights", ""), ("Scheme", ""), ("Bits", "per weight, all counted"), ("Error", "alone")]
    listing = table(head, rows, text_columns=(2,))
    return html + f"<details><summary>All {counted(len(rows), 'layer')} of the recipe</summary>{listing}</details>"


def next_bits(records: Records) -> str:
    """Return what one more bit would buy, best layers first."""
    space, choice = records.space, records.choice
    if space is None:
        return missing("space.json", "No layers")
    if choice is None:
        return missing("recipe.yaml", "No recipe to improve")
    if records.explanation is None:
        return missing("attribution.json", "No explanation to spend bits by")
    name, attribution = records.explanation
    steps = insights.one_more_bit(space, attribution.values, choice)
    if not steps:
        return paragraph(f"By the {name} surrogate no layer gains from a wider option.")
    rows = []
    for step in steps:
        cells = [
            dotted(step.layer),
            esc(describe(step.now)),
            esc(describe(step.then)),
            esc(megabytes(step.extra_bits / 8)),
            f"{step.gain:.3g}",
            f'<span class="bar"><i style="width:{100 * step.per_bit / steps[0].per_bit:.1f}%"></i></span>',
        ]
        rows.append(("", cells))
    head = [
        ("Layer", ""),
        ("Now", ""),
        ("Wider", ""),
        ("Costs", "more on disk"),
        ("Buys", "in −log FID"),
        ("Per bit", "full bar: best"),
    ]
    caption = (
        f"The {len(steps)} layers where wider codes pay best by the {name} surrogate's values, one change each, to the "
        "option of most value per bit spent. Values add up over layers as far as the explanation is right: measure "
        "before you trust."
    )
    return table(head, rows, text_columns=(1, 2, 5)) + paragraph(caption, "caption")


def surrogates(records: Records) -> str:
    """Return the surrogates' quality beside what is known without learning."""
    if records.surrogate is None:
        return missing("surrogate.json", "No surrogates")
    folds, null = records.surrogate["held_out_spearman"], records.surrogate["without_learning"]
    best = max(folds, key=lambda name: float(np.mean(folds[name])))
    strongest = max(null, key=lambda name: null[name])
    mean, sd = float(np.mean(folds[best])), float(np.std(folds[best]))
    gain = mean - null[strongest]
    word = "above" if gain > sd else "below" if gain < -sd else "no further than the fold spread from"
    text = (
        f"The {best} surrogate ranks held-out configurations best: {mean:.2f}\u00a0±\u00a0{sd:.2f} over folds, {word} "
        f"the best that is known without learning ({strongest}, {null[strongest]:.2f})."
    )
    learned = [(f"{name} surrogate", float(np.mean(f)), float(np.std(f))) for name, f in folds.items()]
    rows = [Meter(name, m, f"{m:.2f}\u00a0±\u00a0{s:.2f}", "recipe", s) for name, m, s in learned]
    rows += [Meter(name, value, f"{value:.2f}", "noise") for name, value in null.items()]
    caption = (
        f"Spearman's rank correlation with −log FID (1: ranks every configuration right). Surrogates: mean and "
        f"standard deviation over {len(folds[best])} folds of {records.surrogate['trials']} trials; the rest needs no "
        "learning and is computed over all trials. Configurations of many sizes are compared, so bits alone rank "
        "well; what counts is the distance to the rows that need no learning."
    )
    picture = dots(rows, "Held-out rank correlation")
    text += "" if records.cheap is None else f" Cheap labels: {told(records.cheap)}."
    return paragraph(text) + figure(picture, "Can quality be predicted?", caption, kind="wide")
