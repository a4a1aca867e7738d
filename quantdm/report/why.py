"""Why this recipe: shares of its layers against a rival; and what names are worth and what is not known."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdm.errors import counted
from quantdm.report.advice import Names, advice, doubts, read_names, shared_schemes
from quantdm.report.figures import describe
from quantdm.report.markup import dotted, esc, missing, paragraph, table
from quantdm.report.published import compare_published
from quantdm.report.records import Records
from quantdm.report.wording import percent
from quantdm.runs.explain import leading
from quantdm.surrogates import Attribution, SearchSpace

Ints = NDArray[np.int64]

TOP = 12  # layers of a table


def why(records: Records) -> str:
    """Return what the chosen recipe has over its rival, layer by layer: predicted, and measured."""
    if records.why is None:
        return missing("why.json", "No comparison with a rival")
    found = records.why["explanations"]
    name = leading(found, records.selection, records.surrogate)
    layers = found[name]["layers"]
    whole = sum(abs(row["contribution"]) for row in layers)
    if not layers or whole == 0:
        return paragraph("By this explanation the recipe and its rival do not differ.")
    shown = layers[:TOP]
    share = sum(abs(row["contribution"]) for row in shown) / whole
    text = _difference(records.why, name)
    text += f" The {counted(len(shown), 'layer')} below carry {percent(share)} of all that changed "
    text += f"in {counted(len(layers), 'layer')}."
    head = [("Layer", ""), ("Rival", ""), ("Recipe", ""), ("Share of y", f"{name} surrogate, ± over folds")]
    rows = [
        [
            dotted(row["layer"]),
            esc(describe(row["reference"])),
            esc(describe(row["option"])),
            f"{row['contribution']:+.3f} <small>±\u00a0{row['spread']:.3f}</small>",
        ]
        for row in shown
    ]
    note = (
        "Shares sum to the predicted difference exactly: Shapley values inside blocks, along a straight line of the "
        "cost between them. Spread is the standard deviation over five folds. For other pairs: quantdm "
        "explain --recipe --against."
    )
    listing = table(head, [("", cells) for cells in rows], text_columns=(1, 2))
    return paragraph(text) + listing + paragraph(note, "caption")


def _difference(record: dict[str, Any], name: str) -> str:
    """Say what differs, by how much by every surrogate, and what was measured."""
    one, found = record["explanations"][name], record["explanations"]
    text = (
        f"The recipe (“{record['chosen']}”) against “{record['against']}”, in y = −log FID to full precision (larger "
        f"is better): base {one['base']:+.3f}, predicted {one['predicted']:+.3f}, difference predicted "
        f"{one['predicted'] - one['base']:+.3f} by the {name} surrogate"
    )
    text += "".join(f", {o['predicted'] - o['base']:+.3f} by {n}" for n, o in found.items() if n != name)
    return f"{text}; measured {_measured(record['measured'])}."


def _measured(differences: list[float]) -> str:
    if not differences:
        return "nowhere on equal noises"
    mean = f"{np.mean(differences):+.3f}"
    if len(differences) == 1:
        return f"{mean} (one draw)"
    return f"{mean}\u00a0±\u00a0{np.std(differences, ddof=1):.3f} ({counted(len(differences), 'draw')})"


def unknowns(records: Records) -> str:
    """Return advice in sentences, what names are worth, what can share a scheme, and where folds disagree."""
    space, choice = records.space, records.choice
    if space is None:
        return missing("space.json", "No layers")
    if choice is None:
        return missing("recipe.yaml", "No recipe")
    if records.explanation is None:
        return missing("attribution.json", "No explanation")
    name, explained = records.explanation
    lines = []
    for sentence in advice(space, explained, choice):
        first, _, rest = sentence.partition(": ")
        lines.append(f"<li><strong>{esc(first)}:</strong> {esc(rest)}</li>")
    names = read_names(space, explained.values)
    html = f'<ol class="insights">{"".join(lines)}</ol>' + _names_table(names)
    html += paragraph(
        f"Values of the {name} surrogate. Method and width are main effects on the mean layer (they explain "
        f"{percent(names.share)} of how options differ there); role is how strongly an operation type feels "
        "them, 1 on average. y as at the median trial.",
        "caption",
    )
    return html + _published(space, explained) + _sharing(space, explained, choice) + _doubts(space, explained, choice)


def _published(space: SearchSpace, explained: Attribution) -> str:
    rows = [
        ("", [esc(item.published), "yes" if item.agrees else "no", esc(item.found)])
        for item in compare_published(space, explained.values)
    ]
    head = [("Published of such architectures", ""), ("Here too", ""), ("This run", "")]
    listing = table(head, rows, text_columns=(1, 2)) if rows else paragraph("Nothing was published of such a network.")
    return f"<details><summary>Compared with published insights</summary>{listing}</details>"


def _sharing(space: SearchSpace, explained: Attribution, choice: Ints) -> str:
    rows = [
        ("", [esc(item.op_type), str(item.layers), esc(describe(item.scheme)), f"{item.loss:.4f}"])
        for item in shared_schemes(space, explained.values, choice)
    ]
    head = [("Operation type", ""), ("Layers", ""), ("One scheme for all", "of no more bytes"), ("Costs", "of y")]
    listing = table(head, rows, text_columns=(2,)) if rows else paragraph("None of several layers.")
    return f"<details><summary>Which layers could share a scheme</summary>{listing}</details>"


def _doubts(space: SearchSpace, explained: Attribution, choice: Ints) -> str:
    rows = [
        ("", [dotted(d.layer), esc(describe(d.option)), esc(describe(d.rival)), f"{d.gap:+.4f}", f"{d.spread:.4f}"])
        for d in doubts(space, explained, choice)
    ]
    head = [
        ("Layer", ""),
        ("Recipe", ""),
        ("As good", "in no more bits"),
        ("Apart", "in y"),
        ("Spread", "over folds"),
    ]
    listing = table(head, rows, text_columns=(1, 2)) if rows else paragraph("No layer.")
    return f"<details><summary>Where the folds disagree: {counted(len(rows), 'layer')}</summary>{listing}</details>"


def _names_table(names: Names) -> str:
    """Return the worth of every method, width and role as one table."""
    rows = [("Method", esc(name.replace("-", " ")), f"{value:+.4f}") for name, value in names.methods.items()]
    rows += [("Width", f"{width}\u00a0bits", f"{value:+.4f}") for width, value in names.widths.items()]
    ranked = sorted(names.roles.items(), key=lambda item: -item[1])
    rows += [("Role", esc(name), f"×\u00a0{value:.2f}") for name, value in ranked]
    head = [("Category", ""), ("Name", ""), ("Worth", "in y; roles: × the mean")]
    return table(head, [("", list(row)) for row in rows], text_columns=(1,))
