"""Embedding tables: packed row by row, decoded row by row, counted to the byte, untouched by older recipes."""

import copy
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from quantdm import (
    QuantDMError,
    QuantizedWeight,
    Recipe,
    Scheme,
    apply_recipe,
    export_pipeline,
    get_denoiser,
    list_layers,
    list_tables,
    load_pipeline,
    load_recipe,
    look_at,
    quantize_weight,
    set_residency,
)
from quantdm.hub.inspection import inspect_target
from quantdm.hub.left import told_left
from quantdm.hub.quantize import average_bits, model_layers
from quantdm.hub.size import ExportSize, denoiser_bytes
from quantdm.metrics.samples import Draw
from quantdm.modules import QuantEmbedding, dequantize_module_, packed_layers, quantize_module_
from quantdm.quantizers import count_bits
from quantdm.recipe.joint import joint_config, joint_rules
from quantdm.runs.evaluator import Job, job_of
from quantdm.runs.run import Run
from quantdm.runs.settings import make_settings
from tests.hub_models import load, make_dit, run

RULES = {"default": "kmeans-channel-3", "embeddings": "uniform-channel-8"}
SCHEMES = (
    "uniform-channel-8", "uniform-group3-5-symmetric", "kmeans-channel-4", "kmeans-group16-3", "kmeans-tensor-6",
    "kmeans-shared-4", "kmeans-shared16-4", "log2-channel-4", "uniform-channel-4-hadamard", "uniform-tensor-7",
)  # fmt: skip


class LayerName(NamedTuple):
    """What rules look at in a layer."""

    name: str
    op_type: str
    kind: str = "linear"


def packed_table(rows, width, label, **options):
    """A table of random rows with some that are zero, and the packed one in its place."""
    torch.manual_seed(rows * 31 + width)
    owner = nn.ModuleDict({"table": nn.Embedding(rows, width, **options)}).requires_grad_(False)
    owner.table.weight[::3] = 0
    dense = copy.deepcopy(owner.table)
    quantize_module_(owner, "table", quantize_weight(dense.weight, Scheme.parse(label)))
    return dense, owner


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 600), width=st.integers(1, 70), label=st.sampled_from(SCHEMES), seed=st.integers(0, 9))
def test_looked_up_rows_are_those_of_the_whole_table_bit_by_bit(rows, width, label, seed):
    _, owner = packed_table(rows, width, label)
    whole = owner.table.quantized.dequantize()
    ids = torch.randint(rows, (2, 5), generator=torch.manual_seed(seed))
    assert isinstance(owner.table, QuantEmbedding)
    assert torch.equal(owner.table(ids), whole[ids])
    assert owner.table(ids[:0]).shape == (0, 5, width)
    assert torch.equal(owner.table(ids.int()), whole[ids])


def test_only_the_looked_up_rows_are_decoded(monkeypatch):
    _, owner = packed_table(1000, 16, "uniform-channel-8")
    decoded = []
    rows = QuantizedWeight.rows
    monkeypatch.setattr(QuantizedWeight, "rows", lambda w, i, **k: decoded.append(len(i)) or rows(w, i, **k))
    monkeypatch.setattr(QuantizedWeight, "dequantize", lambda *a, **k: pytest.fail("decoded as a whole"))
    owner.table(torch.tensor([[7, 7, 3], [3, 999, 7]]))
    assert decoded == [3]


def test_a_packed_table_behaves_as_the_torch_layer_of_its_weight():
    dense, owner = packed_table(50, 12, "uniform-channel-8", padding_idx=3, sparse=True)
    table, ids = owner.table, torch.tensor([3, 0, 49])
    assert not table(torch.tensor([3])).any()  # a padding row, all zeros, stays so
    assert (table(ids) - dense(ids)).abs().max() < 0.03
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="out of range"):
            table(torch.tensor([0, wrong]))
    expected = table(ids)
    for residency in ("dense", "int8", "integer", "auto", "packed"):
        assert set_residency(owner, residency) == ()
        assert torch.equal(table(ids), expected)
        assert (table.held_bytes > table.packed.nbytes) == (residency == "dense")
    assert owner.to(torch.bfloat16).table(ids).dtype == torch.bfloat16
    plain = dequantize_module_(owner.float(), "table")
    assert type(plain) is nn.Embedding
    assert list(plain._parameters) == ["weight"]
    assert torch.equal(plain(ids), expected)


def test_tables_that_share_their_weight_or_change_it_are_none():
    own, twin = nn.Embedding(5, 4), nn.Embedding(5, 4)
    twin.weight = own.weight
    model = nn.ModuleDict({"a": own, "b": twin, "c": nn.Embedding(5, 4, max_norm=1.0), "d": nn.Embedding(5, 4)})
    assert [table.name for table in list_tables(model)] == ["d"]
    t5 = T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    names = [table.name for table in list_tables(t5)]
    assert names == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]


@pytest.mark.parametrize("rules", [{"default": "kmeans-channel-3"}, {"patterns": {"*": "kmeans-channel-3"}}])
def test_a_recipe_without_a_rule_for_tables_leaves_them_as_they_are(rules):
    model = make_dit()
    before = {table.name: model.get_submodule(table.name).weight.clone() for table in list_tables(model)}
    apply_recipe(model, Recipe(model="tiny", **rules), insist=True)
    assert before
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert type(model.get_submodule(name)) is nn.Embedding


def test_exact_name_beats_pattern_beats_type_beats_the_rule_of_all_tables():
    model = make_dit()
    first, second = [table.name for table in list_tables(model)]
    kind = list_tables(model)[0].op_type
    layers = model_layers(model)

    def of(**rules):
        config = Recipe(model="tiny", **{**RULES, **rules}).resolve(layers)
        return config.get(first) and config[first].label, config.get(second) and config[second].label

    assert of() == ("uniform-channel-8",) * 2
    assert of(embeddings=None) == of(embeddings="original") == (None, None)
    assert of(types={kind: "uniform-channel-5"}) == ("uniform-channel-5",) * 2
    everywhere = {"types": {kind: "uniform-channel-5"}, "patterns": {"*embedding_table": "uniform-channel-6"}}
    assert of(**everywhere) == ("uniform-channel-6",) * 2
    assert of(**everywhere, layers={first: "uniform-channel-7"}) == ("uniform-channel-7", "uniform-channel-6")
    assert of(patterns={"transformer_blocks.0.*": "uniform-channel-4"}) == ("uniform-channel-8",) * 2
    exact = Recipe(model="tiny", **RULES).exact(layers)
    assert exact.resolve(layers) == Recipe(model="tiny", **RULES).resolve(layers)
    with pytest.raises(QuantDMError, match=r"embedding_table: .* has none; choose a scheme without calibration"):
        apply_recipe(
            model, Recipe(model="tiny", default="original", embeddings="kmeans-channel-4-feedback"), insist=True
        )


def test_the_rule_survives_files_overrides_and_several_denoisers(tmp_path):
    recipe = Recipe(model="tiny", **RULES)
    assert load_recipe(recipe.save(tmp_path / "r.yaml")) == recipe
    (tmp_path / "top.yaml").write_text("extends: r.yaml\npatterns: {'*to_q': uniform-channel-4}\n")
    assert load_recipe(tmp_path / "top.yaml").embeddings == "uniform-channel-8"
    model = make_dit()
    changed = recipe.override(["*.0.*embedding_table=kmeans-channel-4"]).resolve(model_layers(model))
    assert [changed[table.name].label for table in list_tables(model)] == ["kmeans-channel-4", "uniform-channel-8"]
    labels = {"a": "kmeans-channel-3", "second:b": "kmeans-channel-4"}
    found = Recipe(model="two", **joint_rules(labels, ("first", "second"), embeddings="uniform-channel-8"))
    assert found.embeddings == found.components["second"].embeddings == "uniform-channel-8"
    layers = [LayerName("a", "a"), LayerName("second:b", "second:b"), LayerName("second:t", "second:t", "embedding")]
    assert joint_config(found, layers, ("first", "second")).to_labels() == labels | {"second:t": "uniform-channel-8"}


@pytest.mark.parametrize("label", ["uniform-channel-8", "kmeans-shared16-4"])
def test_a_saved_model_with_tables_opens_bit_by_bit_the_same(label, tmp_path):
    model = make_dit().eval()  # in training, labels are dropped at random
    apply_recipe(
        model, Recipe(model="tiny", default="uniform-channel-4", embeddings=label), insist=True
    ).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert packed_layers(again).keys() == packed_layers(model).keys()
    assert any(isinstance(layer, QuantEmbedding) for layer in packed_layers(again).values())
    assert torch.equal(run(again), run(model))
    expected = run(model)
    again.dequantize()
    assert torch.equal(run(again), expected)
    assert not packed_layers(again)


def test_an_export_has_the_counted_bytes_and_says_what_it_leaves(tmp_path):
    names = [layer.name for layer in list_layers(get_denoiser(load_pipeline("digits-dit")))]
    labels = dict.fromkeys(names, "uniform-channel-4")
    pipe, sizes = load_pipeline("digits-dit"), {}
    for embeddings in (None, "uniform-channel-8"):
        recipe = Recipe(model="digits-dit", layers=labels, embeddings=embeddings)
        folder = export_pipeline("digits-dit", recipe, tmp_path / str(embeddings))
        sizes[embeddings] = denoiser_bytes(folder, load_pipeline(folder))
        assert sizes[embeddings] == ExportSize(pipe, embeddings=embeddings).of(labels)
        record = inspect_target(str(folder))
        assert record["avg_bits"] == average_bits(list_layers(pipe.transformer), recipe.config)
        assert ("embedding tables 1.922 MB" in record["left"]) == (embeddings is None)
    tables = list_tables(pipe.transformer)
    bits = [count_bits(table.shape, Scheme.parse("uniform-channel-8")) for table in tables]
    assert bits == [1001 * 160 * 8 + 1001 * 32 + 32] * 6
    saved = sum(2 * table.num_weights for table in tables) - sum(-(-b // 64) * 8 for b in bits)
    assert sizes[None] - sizes["uniform-channel-8"] == pytest.approx(saved, abs=1500)  # the header lists them otherwise


def test_a_run_from_before_keeps_its_records_and_goes_on_with_its_tables_as_they_are(tmp_path):
    asked = {"target_bits": 3.2, "target_bytes": None, "trials": 40, "seed": 0}
    subject = look_at("digits-dit")
    before = make_settings(subject, **asked, embeddings=None)
    assert "embeddings" not in before.model_dump(mode="json")
    run = Run.create(tmp_path / "run", before)
    new = make_settings(subject, **asked)
    assert new.embeddings == "uniform-channel-8"
    assert Run.create(tmp_path / "run", new).settings == run.settings == before
    other = new.model_copy(update={"embeddings": "kmeans-channel-4"})
    with pytest.raises(QuantDMError, match='embeddings is null, asked for "kmeans-channel-4"'):
        Run.create(tmp_path / "run", other)
    assert job_of(run, Draw(0, 2, 1), {}).key == Job(Draw(0, 2, 1), {}).key
    with pytest.raises(QuantDMError, match="tables have no inputs"):
        make_settings(subject, **asked, embeddings=Scheme.parse("uniform-channel-4-feedback"))


def test_what_weighs_less_than_a_hundredth_is_not_told():
    assert told_left({"norms": 9, "biases": 10}, 1000) is None
    assert told_left({"norms": 11, "biases": 10}, 1000) == "left unquantized: norms 0.000 MB (1.1 %)"


def test_tables_of_a_text_encoder_are_quantized_when_its_rules_say_so(tmp_path):
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=98,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder, ids = CLIPTextModel(config).eval(), torch.tensor([[1, 5, 98]])
    apply_recipe(encoder, Recipe(model="clip", **RULES), insist=True).save_pretrained(tmp_path)
    tables = [name for name, layer in packed_layers(encoder).items() if isinstance(layer, QuantEmbedding)]
    assert len(tables) == 2
    again = CLIPTextModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).last_hidden_state, encoder(ids).last_hidden_state)
