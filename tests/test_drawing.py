"""The drawing of the graph: every node once, nothing on top of anything else, colours that follow the values."""

import re
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from quantdm.errors import QuantDMError
from quantdm.report.drawing import SCALE, draw_graph
from tests.test_graph import graph_of

NAMES = ["digits-dit", "digits-sd", "pixart-xl-2", "sdxl"]
SVG = "{http://www.w3.org/2000/svg}"


def circles(svg: str) -> list[tuple[float, float, float, str]]:
    """x, y, radius and fill of every circle."""
    found = ET.fromstring(svg).iter(f"{SVG}circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"]), float(c.attrib["r"]), c.attrib["fill"]) for c in found]


@pytest.mark.parametrize("name", NAMES)
def test_every_node_is_drawn_once_inside_the_picture_and_apart(name):
    graph = graph_of(name)
    svg = draw_graph(graph)
    marks = circles(svg)
    assert len(marks) == len(graph.nodes)
    width, height = (float(n) for n in re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())  # pyright: ignore
    assert all(r <= x <= width - r and r <= y <= height - r for x, y, r, _ in marks)
    xy = np.array([(x, y) for x, y, _, _ in marks])
    assert len(np.unique(xy.round(1), axis=0)) == len(xy)
    titles = [t.text or "" for t in ET.fromstring(svg).iter(f"{SVG}title")]
    assert {node.layer or node.name for node in graph.nodes} <= {title.split("\n")[0] for title in titles}
    boxes = [title for title in titles if "root seen over" in title]
    assert len(boxes) >= sum(len(block.layers) > 1 for block in graph.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_data_flows_like_text(name):
    graph = graph_of(name)
    marks = circles(draw_graph(graph))
    for source, target in graph.edges:
        (x1, y1, *_), (x2, y2, *_) = marks[source], marks[target]
        assert x2 > x1 or y2 > y1  # to the right, or in a row below


def test_a_small_graph_takes_less_than_a_second():
    graph = graph_of("digits-dit")
    start = time.process_time()
    draw_graph(graph)
    assert time.process_time() - start < 1


def test_colours_follow_the_values_and_the_bar_names_their_ends(tmp_path):
    graph = graph_of("digits-dit")
    layers = [node.layer for node in graph.nodes if node.layer is not None]
    values = {layer: 10.0**i for i, layer in enumerate(layers[:5])}
    svg = draw_graph(graph, values=values, label="what & why", log=True, path=tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_text().startswith(svg)  # what follows is a comment
    fill = {node.id: mark[3] for node, mark in zip(graph.nodes, circles(svg), strict=True)}
    of_layer = {node.layer: fill[node.id] for node in graph.nodes if node.layer is not None}
    assert [of_layer[layer] for layer in layers[:5]] == list(SCALE)  # even steps of the logarithm
    assert {of_layer[layer] for layer in layers[5:]} == {"white"}
    assert "1e+04" in svg
    assert "what &amp; why (log scale)" in svg
    assert draw_graph(graph, values=values, label="what & why", log=True) == svg


@pytest.mark.parametrize(
    ("values", "log", "message"),
    [({"proj_out_3": 1.0}, False, "nearest: proj_out_"), ({"proj_out_1": float("nan")}, False, "finite numbers"),
     ({"proj_out_1": 0.0}, True, "positive numbers")],
    ids=["unknown layer", "nan", "zero on a log scale"],
)  # fmt: skip
def test_bad_values_are_one_clear_error(values, log, message):
    with pytest.raises(QuantDMError, match=message):
        draw_graph(graph_of("digits-dit"), values=values, log=log)
