"""Every denoiser class that diffusers exports: traced from class and configuration, or listed with its reason."""

import importlib.util
import json
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from quantdm.denoisers import analysis, example_inputs
from quantdm.denoisers.analysis import analyse, trace_graph
from quantdm.denoisers.example_inputs import find_inputs, infer_inputs, meta_copy, to_meta
from quantdm.errors import QuantDMError
from tests.test_families import ROOT


def script(name: str) -> ModuleType:
    """A script of eval/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MATRIX = script("trace_matrix")
RECORD: dict[str, Any] = json.loads(MATRIX.RESULTS.read_text())
CLASSES: dict[str, type[nn.Module]] = MATRIX.denoiser_classes()
AS_RECORDED = RECORD["versions"]["diffusers"] == diffusers.__version__
# A third of them now, the same in every run; all of them when the record is made.
SOME = [name for name in sorted(CLASSES)[1::3] if AS_RECORDED or name in RECORD["classes"]]
KANDINSKY_2_2 = {
    "encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image",
    "cross_attention_dim": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def test_the_record_holds_every_class_that_is_exported() -> None:
    assert not AS_RECORDED or set(RECORD["classes"]) == set(CLASSES), "run eval/trace_matrix.py again"
    assert len(CLASSES) > 60
    for kind in ("Transformer", "UNet", "ControlNet", "Prior", "MotionAdapter"):
        assert any(kind in name for name in CLASSES), kind


def test_at_least_95_of_100_classes_are_traced() -> None:
    records = RECORD["classes"].values()
    traced = sum(record["traced"] for record in records)
    assert traced >= 96
    assert traced / sum(not record["list"] for record in records) >= 0.95
    assert all(record["reason"] for record in records if not record["traced"])
    untraced = {name for name, record in RECORD["classes"].items() if not record["traced"]}
    assert set(MATRIX.REASONS) == untraced  # no reason is kept for what is traced, and none is a mere error message


@pytest.mark.parametrize("name", SOME)
def test_a_class_is_traced_as_recorded(name: str) -> None:
    found, recorded = MATRIX.trace(CLASSES[name]), RECORD["classes"][name]
    assert found == recorded if AS_RECORDED else found["traced"] or not recorded["traced"]


def test_the_support_page_says_what_is_recorded() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    traces = script("support_matrix").traces(RECORD)
    assert traces in page
    for name, record in RECORD["classes"].items():
        assert record["traced"] or f"`{name}`" in traces
    assert f"**{sum(r['traced'] for r in RECORD['classes'].values())} of these {len(RECORD['classes'])} " in traces


def test_a_unet_that_is_conditioned_on_images_is_traced() -> None:
    with torch.device("meta"):
        graph = trace_graph(diffusers.UNet2DConditionModel(**KANDINSKY_2_2))
    reached = {end for edge in graph.edges for end in edge}
    assert {node.layer for node in graph.nodes if node.id not in reached} <= {None}


class Reader(ModelMixin, ConfigMixin):
    """Reads values of masks and positions in Python, as many denoisers do; its video is given frames first."""

    @register_to_config
    def __init__(self, in_channels: int = 4, text_dim: int = 8, num_experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv3d(in_channels, 8, 1)
        self.text = nn.Linear(text_dim, 8)
        self.router = nn.Linear(8, num_experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.embed(hidden_states.permute(0, 2, 1, 3, 4)).flatten(2).transpose(1, 2)
        if encoder_attention_mask is None:
            raise ValueError("no mask")
        lengths = encoder_attention_mask.sum(dim=1).tolist()
        text = self.text(encoder_hidden_states)[encoder_attention_mask.bool()].split(lengths)
        with torch.autocast(x.device.type, enabled=False):
            places = torch.tensor([0, 1], device=x.device)
            x = x[:, int(places.max()) :] + torch.stack([part.mean(0) for part in text])[:, None]
        chosen = self.router(x).topk(1).indices.flatten()
        counts, flat, start = chosen.bincount().cpu().numpy(), x.flatten(0, 1)[chosen.argsort()], 0
        parts = []
        for expert, count in zip(self.experts, counts, strict=False):
            parts.append(expert(flat[start : start + count]))
            start += count
        return torch.cat(parts)


class Stubborn(ModelMixin, ConfigMixin):
    """Fails after its first layer whatever it is given."""

    @register_to_config
    def __init__(self, in_channels: int = 4, text_dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, 8, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        raise ValueError(f"not with {tuple(self.embed(sample).shape)}")


class Deaf(ModelMixin, ConfigMixin):
    """Its output has nothing to do with its layer."""

    @register_to_config
    def __init__(self, in_channels: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 2


def test_values_of_masks_are_known_and_every_expert_takes_part() -> None:
    graph = trace_graph(Reader())
    reached = {end for edge in graph.edges for end in edge}
    layers = {node.layer for node in graph.nodes if node.id in reached}
    assert layers >= {"embed", "text", "experts.0", "experts.1", "experts.2"}


def test_inputs_are_found_one_change_after_the_other() -> None:
    model = Reader()
    inputs = infer_inputs(model, model.config)
    assert inputs["hidden_states"].shape == (2, 6, 4, 48, 48)  # frames before channels
    assert inputs["encoder_hidden_states"].shape == (2, 12, 8)
    assert inputs["encoder_attention_mask"].tolist() == [[1] * 12] * 2


def test_given_masks_keep_their_values() -> None:
    given = {
        "hidden_states": torch.zeros(1, 2, 4, 3, 3),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 5, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
    }
    kept = to_meta(given)
    assert kept["encoder_attention_mask"].tolist() == [[1, 1, 0, 0, 0]]
    assert kept["encoder_hidden_states"].is_meta
    assert analyse(Reader(), example_inputs=given).trace.outputs


def test_trials_are_bounded_and_the_error_is_that_of_the_one_that_came_furthest(monkeypatch) -> None:
    model, tried = Stubborn(), []

    def run(*args: Any) -> Any:
        tried.append(args)
        return analysis.trace_forward(*args)

    with pytest.raises(QuantDMError, match=r"Stubborn: its forward fails .*not with \(2, 8, 48, 48\).*example_inputs="):
        find_inputs(meta_copy(model, model.config), model.config, run)
    assert 1 < len(tried) <= example_inputs.TRIALS
    monkeypatch.setattr(example_inputs, "TRIALS", 3)
    tried.clear()
    with pytest.raises(QuantDMError, match="Stubborn"):
        find_inputs(meta_copy(model, model.config), model.config, run)
    assert len(tried) == 3


def test_a_forward_that_uses_no_layer_is_no_trace() -> None:
    with pytest.raises(QuantDMError, match="its output depends on none of its layers"):
        trace_graph(Deaf())


def test_tracing_leaves_torch_as_it_was() -> None:
    before = torch.autocast, torch.tensor, torch.nn.attention.flex_attention.flex_attention
    trace_graph(Reader(text_dim=16))
    with pytest.raises(QuantDMError):
        trace_graph(Stubborn(text_dim=16))
    assert before == (torch.autocast, torch.tensor, torch.nn.attention.flex_attention.flex_attention)
