"""Which path carries the damage: the measured edges on the graph, and what they say in words."""

from typing import Any

from quantdm.errors import counted
from quantdm.report.atlas import drawn
from quantdm.report.drawing import Layout, curve
from quantdm.report.markup import dotted, figure, missing, paragraph, table
from quantdm.report.records import Records
from quantdm.report.wording import percent
from quantdm.schemes import QuantConfig

LEAST, MOST = 1.6, 6.0  # width of a line that undoes nothing alone, and of one that undoes everything


def paths(records: Records) -> str:
    """Return the edges that carry the damage of the recipe, drawn on the map."""
    record, space = records.paths, records.space
    if record is None:
        return missing("paths.json", "No path of the damage", kind="missing extra")
    if space is None:
        return missing("space.json", "No graph")
    if record["configuration"] == "the recipe" and record["labels"] != records.labels:
        again = "quantdm explain --run-dir RUN_DIR --paths"
        return paragraph(
            f"The paths that were measured are of an earlier recipe; run `{again}` again.", "missing extra"
        )
    carrying = [record["edges"][index] for index in record["carrying"]]
    text = paragraph(say_paths(record))
    if not carrying:
        return text
    choice = space.choice_of(QuantConfig.from_labels(record["labels"]))
    bits = space.gather(space.bits, choice)[0] / space.num_weights
    svg = drawn(space, bits, space.layer_names, over=lambda place: trails(place, carrying))
    caption = (
        "Marked: the edges that carry the damage, wider where full precision on this edge alone undoes more. Numbers "
        "are bits per weight."
    )
    rows = [("", [dotted(e["source"]), dotted(e["target"]), percent(max(e["undoes"], 0.0))]) for e in carrying]
    listing = table([("From", ""), ("To", ""), ("Undoes", "alone")], rows, text_columns=(1,))
    return (
        text
        + figure(svg, "Where the damage runs.", caption)
        + f"<details><summary>The {counted(len(carrying), 'edge')}</summary>{listing}</details>"
    )


def say_paths(record: dict[str, Any]) -> str:
    """Say which edges carry the damage, where it enters and how it was measured."""
    edges, carrying = record["edges"], record["carrying"]
    name = record["configuration"]
    if not carrying:
        return f"By this measurement {name} does no damage that an edge carries."
    enters = list(dict.fromkeys(edges[index]["source"] for index in carrying))
    inside = {edges[index]["target"] for index in carrying}
    first = [source for source in enters if source not in inside]
    said = ", ".join(first[:4]) + (f" and {counted(len(first) - 4, 'other')}" if len(first) > 4 else "")
    return (
        f"The damage of {name} runs along {len(carrying)} of {len(edges)} edges of the data flow. With the "
        f"full-precision tensors on them {percent(record['undone'])} of it is undone; with full precision on all "
        f"others {percent(1 - record['missing'])} of it stays. It enters at {said}. Measured in the denoiser: "
        f"relative error of its output on {record['images']} images at {record['calls']} timesteps, inputs of full "
        "precision."
    )


def trails(place: Layout, carrying: list[dict[str, Any]]) -> str:
    """Draw edges over the graph."""
    found = []
    for edge in carrying:
        width = LEAST + (MOST - LEAST) * min(max(edge["undoes"], 0.0), 1.0)
        for a, b in edge["drawn"]:
            found.append(f'<path class="trail" d="{curve(place, a, b)[0]}" stroke-width="{width:.1f}"/>')
    return "".join(found)
