"""The map: the traced graph of the denoiser with the bits of every layer in its node, and what each one is."""

from collections.abc import Callable, Sequence

import numpy as np

from quantdm.denoisers.graph import Graph, Node
from quantdm.errors import counted
from quantdm.report.drawing import ASPECT, RADIUS, SMALL, Layout, boxes, edges, layout
from quantdm.report.figures import describe
from quantdm.report.markup import esc, figure, missing
from quantdm.report.records import Records
from quantdm.report.theme import themed
from quantdm.report.wording import percent
from quantdm.surrogates import SearchSpace

LEAST, MOST = 2, 8  # bits at the ends of the colours
SLIM = 0.25  # width over height on a phone
TOP = 40.0  # of the drawing's head, which the page says in words


def atlas(records: Records) -> str:
    """Return the graph with the recipe's bits in its nodes."""
    space, choice = records.space, records.choice
    if space is None:
        return missing("space.json", "No graph")
    if choice is None:
        return missing("recipe.yaml", "No recipe to draw on the graph")
    bits = space.gather(space.bits, choice)[0] / space.num_weights
    tips = [_tip(space, choice, position) for position in range(len(space.layers))]
    caption = (
        f"{counted(len(space.layers), 'layer')} from input to output, in rows like text: circles are layers with their "
        "bits per weight (codebooks and scales included), deeper colours for more; dots are operations without "
        "weights, boxes are blocks. Point at a node, or go to the map with the Tab key and through it with the arrow "
        "keys. The table of all layers says the same."
    )
    slim = drawn(space, bits, tips, aspect=SLIM)
    return figure(drawn(space, bits, tips), "Where the bits are.", caption, narrow=slim)


def drawn(
    space: SearchSpace,
    bits: np.ndarray,
    tips: Sequence[str],
    *,
    aspect: float = ASPECT,
    over: Callable[[Layout], str] = lambda place: "",
) -> str:
    """Return the graph as an SVG with bits [L] in its nodes and a tip per layer.

    Args:
        aspect: width over height.
        over: draws on its edges.
    """
    graph = space.graph
    place = layout(graph, aspect=aspect)
    marks = "".join(_mark(graph, node, place.xy[node.id], space, bits, tips) for node in graph.nodes)
    ground = themed("\n".join([*boxes(graph, place), *edges(graph, place)]))
    width, height = round(place.width), round(place.height - TOP)
    label = f"Data-flow graph of {counted(len(space.layers), 'layer')} in {counted(len(graph.blocks), 'block')}"
    return (
        f'<svg class="map" viewBox="0 {TOP:g} {width} {height}" role="img" aria-label="{esc(label)}" '
        f'style="min-width:{min(width, 1400) // 2}px">{ground}{over(place)}{marks}</svg>'
    )


def _mark(graph: Graph, node: Node, xy: np.ndarray, space: SearchSpace, bits: np.ndarray, tips: Sequence[str]) -> str:
    x, y = xy
    if node.layer is None:
        return f'<circle class="join" cx="{x:.1f}" cy="{y:.1f}" r="{SMALL}"/>'
    if node.layer not in space.layer_index:
        return f'<circle class="node" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"><title>{esc(node.layer)}</title></circle>'
    position = space.layer_index[node.layer]
    level = min(max(round(float(bits[position])), LEAST), MOST)
    text = f"{bits[position]:.0f}"
    return (
        f'<g class="node b{level}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS + 1}"/>'
        f'<text x="{x:.1f}" y="{y + 3:.1f}">{text}</text><title>{esc(tips[position])}</title></g>'
    )


def _tip(space: SearchSpace, choice: np.ndarray, position: int) -> str:
    layer, option = space.layers[position], int(choice[position])
    bits = space.bits[position, option] / layer.num_weights
    return (
        f"{layer.name}: {describe(space.labels[option])}, {bits:.2f} bits with everything, {layer.num_weights:,} "
        f"weights, alone it changes the output by {percent(float(space.noise_error[position, option]))}"
    )
