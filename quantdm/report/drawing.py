"""The data-flow graph of a denoiser as one SVG: layers coloured by any value, blocks as faint boxes."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from quantdm.denoisers.graph import Graph, Node
from quantdm.errors import QuantDMError, counted, nearest
from quantdm.files import MARKUP_COMMENT, check_output, check_replaceable, write_text
from quantdm.report.figures import FAINT, INK, MUTED, RULE

STEP, LANE = 30.0, 32.0  # pixels between ranks and between lanes
RADIUS, SMALL = 8.0, 2.6  # of layers and of combine nodes
MARGIN, HEADER, GAP = 28.0, 64.0, 40.0  # around the picture, above it, and between its rows
ASPECT = 1.7  # width over height that the wrapping aims at
LONG = 8  # ranks from which an edge is drawn faintly: skips and conditions that reach far
SCALE = ("#f4e9c9", "#f0b65a", "#d9662f", "#a3253f", "#4a1244")  # from low to high, darker with more


@dataclass(frozen=True)
class Layout:
    """Where everything stands: pixels [N, 2] of the nodes, the row of text each is in, and the size of the picture."""

    xy: np.ndarray
    row: np.ndarray
    width: float
    height: float


def draw_graph(
    graph: Graph,
    *,
    values: Mapping[str, float] | None = None,
    label: str = "",
    log: bool = False,
    path: str | Path | None = None,
) -> str:
    """Draw a graph from input to output, in rows like text, and return the SVG.

    Circles are layers, coloured by their value; dots are weightless operations; boxes are blocks. Pointing at anything
    shows its name. Edges that reach far (long skips, conditions) are faint.

    Args:
        graph: what `trace_graph` returned.
        values: layer name -> number; layers without one stay white.
        label: what the values are, for the colour bar.
        log: colour by the logarithm (values must be positive).
        path: where to write the SVG, atomically (None: nowhere).

    Raises:
        QuantDMError: values of unknown layers, not finite, or not positive on a log scale; a file that is no drawing of
            quantdm.
    """
    if path is not None:
        check_replaceable(check_output(path))
    given = _check(graph, values or {}, log)
    place = layout(graph)
    low, high = (min(given.values()), max(given.values())) if given else (0.0, 0.0)
    parts = [*boxes(graph, place), *edges(graph, place)]
    parts += [_mark(node, place.xy[node.id], given, low, high, log) for node in graph.nodes]
    width, height = round(place.width), round(place.height)
    layers = sum(node.layer is not None for node in graph.nodes)
    what = f"Data-flow graph: {counted(layers, 'layer')} in {counted(len(graph.blocks), 'block')}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(what)}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="{MARGIN}" y="26" font-size="13" font-weight="bold" fill="{INK}">{escape(what)}</text>\n'
        f"{_key(given, low, high, label, log)}\n" + "\n".join(parts) + "\n</svg>\n"
    )
    if path is not None:
        write_text(path, svg, MARKUP_COMMENT)
    return svg


def _check(graph: Graph, values: Mapping[str, float], log: bool) -> dict[str, float]:
    names = [node.layer for node in graph.nodes if node.layer is not None]
    unknown = [name for name in values if name not in set(names)]
    if unknown:
        raise QuantDMError(
            f"values: {len(unknown)} layers are not in this graph, first {unknown[0]!r}; {nearest(unknown[0], names)}"
        )
    odd = [name for name, value in values.items() if not np.isfinite(value) or (log and value <= 0)]
    if odd:
        wanted = "positive numbers (log=True)" if log else "finite numbers"
        raise QuantDMError(f"values: {odd[0]!r} is {values[odd[0]]}, expected {wanted}; leave such layers out")
    return {name: float(np.log10(value)) if log else float(value) for name, value in values.items()}


# -------------------------------------------------------------------------------------------------------------- layout


def layout(graph: Graph, *, aspect: float = ASPECT) -> Layout:
    """Place nodes by rank (horizontally) and lane, and break the line of ranks into rows between blocks.

    `aspect` is the width over the height that the wrapping aims at.
    """
    rank = _ranks(graph)
    lane = _lanes(graph, rank)
    last = int(rank.max(initial=0))
    free = np.ones(last + 2, dtype=bool)  # may a row end before this rank?
    for block in graph.blocks:
        members = [rank[node.id] for node in graph.nodes if node.block == block.index]
        free[min(members, default=0) + 1 : max(members, default=0) + 1] = False
    heights = np.ptp(lane) + 2 if len(lane) else 1
    per_row = max(12, round(np.sqrt(aspect * (last + 1) * (heights * LANE + GAP) / STEP)))
    starts = [0]
    while last + 1 - starts[-1] > per_row:
        end = starts[-1] + per_row
        safe = [r for r in range(starts[-1] + per_row // 2, end + 1) if free[r]]
        starts.append(safe[-1] if safe else end)
    row = np.searchsorted(starts, rank, side="right") - 1
    xy, top = np.zeros((len(graph.nodes), 2)), HEADER
    xy[:, 0] = MARGIN + RADIUS + STEP * (rank - np.array(starts)[row])
    for index in range(len(starts)):
        inside = row == index
        top += GAP if index else 24.0
        xy[inside, 1] = top + LANE * (lane[inside] - lane[inside].min(initial=0))
        top = xy[inside, 1].max(initial=top)
    return Layout(xy, row, max(float(xy[:, 0].max(initial=0)) + RADIUS + MARGIN, 460.0), top + RADIUS + MARGIN)


def _ranks(graph: Graph) -> np.ndarray:
    """Return the rank of every node: as late as its readers allow, so that conditions stand where they are used."""
    rank = np.zeros(len(graph.nodes), dtype=np.int64)
    readers: dict[int, list[int]] = {}
    for source, target in graph.edges:
        readers.setdefault(source, []).append(target)
    for node in reversed(graph.nodes):  # ids are a topological order
        rank[node.id] = min((rank[t] for t in readers.get(node.id, ())), default=1) - 1
    return rank - rank.min(initial=0)


def _lanes(graph: Graph, rank: np.ndarray) -> np.ndarray:
    """Return the lane of every node: the longest path along lane 0, others near their readers."""
    lane = np.zeros(len(graph.nodes), dtype=np.int64)
    readers: dict[int, list[int]] = {node.id: [] for node in graph.nodes}
    for source, target in graph.edges:
        readers[source].append(target)
    spine, node = set(), next((n.id for n in graph.nodes if rank[n.id] == 0), None)
    while node is not None:
        spine.add(node)
        node = next((t for t in readers[node] if rank[t] == rank[node] + 1), None)
    taken: dict[int, set[int]] = {}
    for index in sorted(readers, key=lambda i: (-rank[i], i not in spine, i)):
        used = taken.setdefault(int(rank[index]), set())
        goal = 0.0 if index in spine else float(np.mean([lane[t] for t in readers[index]] or [1.0]))
        tries = sorted(range(-len(graph.nodes), len(graph.nodes)), key=lambda i: (abs(i - goal), -i)) if used else [0]
        lane[index] = next(i for i in (tries if used else [round(goal)]) if i not in used)
        used.add(int(lane[index]))
    return lane


# --------------------------------------------------------------------------------------------------------------- marks


def boxes(graph: Graph, place: Layout) -> list[str]:
    """Draw the blocks of several layers, one box per row of the picture, with the end of their name."""
    found = []
    for block in graph.blocks:
        members = np.array([node.id for node in graph.nodes if node.block == block.index])
        if len(block.layers) < 2:
            continue
        title = escape(f"{block.name}: {counted(len(block.layers), 'layer')}, root seen over {block.hops} hops")
        for index in np.unique(place.row[members]):
            points = place.xy[members[place.row[members] == index]]
            x, y = points.min(axis=0) - RADIUS - 4
            width, height = np.ptp(points, axis=0) + 2 * RADIUS + 8
            name = _tail(block.name, int(width / 4.2))
            found.append(
                f'<g><title>{title}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'rx="7" fill="{MUTED}" fill-opacity="0.06" stroke="{FAINT}" stroke-width="0.7"/>'
                f'<text x="{x + 3:.1f}" y="{y - 2.5:.1f}" font-size="7" fill="{MUTED}">{escape(name)}</text></g>'
            )
    return found


def _tail(name: str, room: int) -> str:
    """Return as many of the last parts of a dotted name as fit."""
    parts = name.split(".")
    fitting = [t for k in range(len(parts)) if len(t := ".".join(parts[k:])) <= room]
    return fitting[0] if fitting else ""


def edges(graph: Graph, place: Layout) -> list[str]:
    """Draw edges as curves; what would run through other nodes of its lane bends above them."""
    near, far = [], []
    for source, target in graph.edges:
        path, long = curve(place, source, target)
        (far if long else near).append(path)
    return [
        f'<path d="{"".join(far)}" fill="none" stroke="{FAINT}" stroke-width="0.6" stroke-opacity="0.55"/>',
        f'<path d="{"".join(near)}" fill="none" stroke="{MUTED}" stroke-width="0.9" stroke-opacity="0.8"/>',
    ]


def curve(place: Layout, source: int, target: int) -> tuple[str, bool]:
    """Return the path of an edge between two nodes, and whether it reaches far."""
    (x1, y1), (x2, y2) = place.xy[source], place.xy[target]
    same_row = place.row[source] == place.row[target]
    span = (x2 - x1) / STEP
    if same_row and abs(y1 - y2) < 1 and span > 1.5:
        lift = min(8 + 4 * span, 34.0)
        path = f"M{x1:.1f} {y1:.1f}C{x1 + 14:.1f} {y1 - lift:.1f} {x2 - 14:.1f} {y2 - lift:.1f} {x2:.1f} {y2:.1f}"
    else:
        bend = STEP * 0.5 if same_row else STEP
        path = f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return path, not (same_row and span <= LONG)


def _mark(node: Node, xy: np.ndarray, given: dict[str, float], low: float, high: float, log: bool) -> str:
    x, y = xy
    if node.layer is None:
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{SMALL}" fill="{MUTED}"><title>{escape(node.name)}</title></circle>'
        )
    text, fill = f"{node.layer}\n{node.op_type}", "white"
    if node.layer in given:
        value = given[node.layer]
        fill = _colour((value - low) / (high - low) if high > low else 0.5)
        text += f": {10**value if log else value:.4g}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{fill}" stroke="{INK}" stroke-width="0.8">'
        f"<title>{escape(text)}</title></circle>"
    )


def _key(given: dict[str, float], low: float, high: float, label: str, log: bool) -> str:
    """Draw the colour bar, or say what the marks are when there are no values."""
    if not given:
        text = "circles: layers; dots: weightless operations; boxes: blocks"
        return f'<text x="{MARGIN}" y="46" font-size="10" fill="{MUTED}">{text}</text>'
    stops = "".join(f'<stop offset="{i / (len(SCALE) - 1):.2f}" stop-color="{hue}"/>' for i, hue in enumerate(SCALE))
    ends = [f"{10**value if log else value:.3g}" for value in (low, high)]
    scale = f"{label} (log scale)" if log else label
    x, width = MARGIN + 52, 150
    return (
        f'<defs><linearGradient id="values">{stops}</linearGradient></defs>'
        f'<text x="{x - 6}" y="47" font-size="10" text-anchor="end" fill="{MUTED}">{ends[0]}</text>'
        f'<rect x="{x}" y="38" width="{width}" height="11" fill="url(#values)" stroke="{RULE}"/>'
        f'<text x="{x + width + 6}" y="47" font-size="10" fill="{MUTED}">{ends[1]}'
        f'<tspan dx="10" fill="{INK}">{escape(scale)}</tspan></text>'
    )


def _colour(share: float) -> str:
    """Return the colour at 0..1 of the scale."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    index = min(int(place), len(SCALE) - 2)
    ends = [[int(hue[i : i + 2], 16) for i in (1, 3, 5)] for hue in SCALE[index : index + 2]]
    mixed = [round(a + (b - a) * (place - index)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
