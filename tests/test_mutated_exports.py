"""300 damaged exports: each ends in one clear error or in exactly the model that was saved, through both doors."""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

import quantdm
from quantdm import QuantDMError, Scheme, apply_recipe, load_pipeline
from quantdm.modules import packed_layers
from quantdm.modules.blob import blob_size
from tests.forge import edit_file, edit_json, sign
from tests.hub_models import WEIGHTS, contents, mixed_recipe, uniform_config

INDEX = f"{WEIGHTS}.index.json"


def make_pipeline(width: int = 8, seed: int = 0) -> DDPMPipeline:
    """Build the smallest pipeline with a long skip."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(width,),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    return DDPMPipeline(unet, DDPMScheduler())


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of the same export in one file and in shards, and of others that are strange to it."""
    folder = tmp_path_factory.mktemp("exports")
    make_pipeline().save_pretrained(folder / "dense")
    pipe = make_pipeline()
    apply_recipe(pipe, mixed_recipe(pipe.unet), insist=True)
    for name, size in (("whole", "10GB"), ("shards", "10KB")):
        pipe.save_pretrained(folder / name)
        shutil.rmtree(folder / name / "unet")
        pipe.unet.save_pretrained(folder / name / "unet", max_shard_size=size)
    wider, other = make_pipeline(width=12), make_pipeline()
    apply_recipe(wider, mixed_recipe(wider.unet), insist=True).save_pretrained(folder / "wider")
    apply_recipe(other, uniform_config(other.unet), insist=True)
    other.unet.save_pretrained(folder / "other" / "unet", max_shard_size="10KB")
    return folder


def state(model: nn.Module) -> dict[str, object]:
    """Return all that makes a loaded model what it is."""
    packed = {name: (layer.label, layer.split, layer.original_dtype) for name, layer in packed_layers(model).items()}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    tensors = {key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in model.state_dict().items()}
    return {"packed": packed, "tensors": tensors}


# A mutation gets a random generator, the pipeline's directory and the directory of all exports.
Mutation = Callable[[random.Random, Path, Path], object]


def weights(r: random.Random, pipe: Path) -> Path:
    """Choose one of the weight files."""
    return r.choice(sorted((pipe / "unet").glob("*.safetensors")))


def on_bytes(change: Callable[[random.Random, bytearray, int], object]) -> Mutation:
    """Make a mutation of a function of (generator, bytes of a weight file, where its tensors begin)."""

    def mutate(r: random.Random, pipe: Path, _: Path) -> None:
        path = weights(r, pipe)
        data = bytearray(path.read_bytes())
        change(r, data, 8 + struct.unpack("<Q", data[:8])[0])
        path.write_bytes(data)

    return mutate


def flip(r: random.Random, data: bytearray, first: int, last: int) -> None:
    """Flip one bit."""
    data[r.randrange(first, last)] ^= 1 << r.randrange(8)


def zero(r: random.Random, data: bytearray, first: int) -> None:
    """Lose a page, as a disk does."""
    start = r.randrange(first, len(data) - 256)
    data[start : start + 256] = bytes(256)


def on_tensors(change: Callable[[random.Random, dict[str, torch.Tensor], str], object], signed: bool) -> Mutation:
    """Make a mutation of a function of (generator, tensors of a file, one name); half of the signed are forged."""

    def mutate(r: random.Random, pipe: Path, _: Path) -> None:
        def edit(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
            change(r, tensors, r.choice(sorted(tensors)))
            if signed and r.random() < 0.5:
                sign(header, tensors)

        edit_file(weights(r, pipe), edit)

    return mutate


def reshape(r: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Cut a tensor or give it another shape."""
    tensor = tensors[name]
    tensors[name] = r.choice([tensor[:-1].clone(), tensor[None].clone(), torch.cat([tensor, tensor])])


def cast(r: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Give a tensor another dtype."""
    tensor = tensors[name]
    dtypes = [torch.int8, torch.float32, torch.float16, torch.int64, torch.bool]
    tensors[name] = tensor.to(r.choice([dtype for dtype in dtypes if dtype != tensor.dtype]))


def swap(r: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Exchange two tensors of the same size, or reverse one."""
    alike = [key for key in sorted(tensors) if tensors[key].shape == tensors[name].shape and key != name]
    if alike and not torch.equal(tensors[alike[0]], tensors[name]):
        tensors[name], tensors[alike[0]] = tensors[alike[0]], tensors[name]
    else:
        tensors[name] = tensors[name] + 1


def on_table(change: Callable[[random.Random, dict, Path], object], signed: bool = False) -> Mutation:
    """Make a mutation of a function of (generator, layer table, all exports)."""

    def mutate(r: random.Random, pipe: Path, exports: Path) -> None:
        seed, forged = r.randrange(10**9), signed and r.random() < 0.5
        for path in (pipe / "unet").glob("*.safetensors"):

            def edit(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
                table = json.loads(header["quantdm"])
                change(random.Random(seed), table, exports)
                header["quantdm"] = json.dumps(table)
                if forged:
                    sign(header, tensors)

            edit_file(path, edit)

    return mutate


def relabel(r: random.Random, table: dict, _: Path) -> None:
    """Give a layer another scheme whose bytes are as many."""
    labels = [f"{m}-{g}-{b}" for m in ("uniform", "kmeans", "log2") for g in ("channel", "tensor") for b in range(2, 9)]
    table["schemes"] += labels
    for name in r.sample(sorted(table["layers"]), len(table["layers"])):
        index, _, shape, seams = table["layers"][name]
        sizes = [blob_size(tuple(shape), Scheme.parse(x), seams[0] if seams else None) for x in table["schemes"]]
        alike = [
            i for i, size in enumerate(sizes) if size == sizes[index] and table["schemes"][i] != table["schemes"][index]
        ]
        if alike:
            table["layers"][name][0] = r.choice(alike)
            return
    raise AssertionError("no two schemes are of equal size")


def change_layer(r: random.Random, table: dict, _: Path) -> None:
    """Change what the table says of a layer."""
    entry = table["layers"][r.choice(sorted(table["layers"]))]
    place = r.randrange(4)
    new = (r.choice([-1, 99, entry[0] + 1]), 1, [*entry[2][:-1], entry[2][-1] + 1], [] if entry[3] else [1])
    entry[place] = r.choice([new[place], None, "x", {}])


def foreign_table(r: random.Random, table: dict, exports: Path) -> None:
    """Take the layer table of another model or of another recipe."""
    path = next((exports / r.choice(["wider", "other"]) / "unet").glob("*.safetensors"))
    table.clear()
    table.update(json.loads(contents(path)[0]["quantdm"]))


def edit_config(change: Callable[[random.Random, dict], object]) -> Mutation:
    """Make a mutation of a function of (generator, the denoiser's config.json)."""
    return lambda r, pipe, _: edit_json(pipe / "unet/config.json", lambda config: change(r, config))


def spoil(r: random.Random, path: Path) -> None:
    """Make a JSON file something else."""
    text = path.read_text()
    path.write_bytes(
        r.choice(
            [text[: r.randrange(len(text) - 3)].encode(), b"\xff" + text.encode(), b"[1]", b"null", b'"x"', b"[" * 9000]
        )
    )


def replace(source: str) -> Mutation:
    """Make a mutation that takes a weight file of another export."""

    def mutate(r: random.Random, pipe: Path, exports: Path) -> None:
        path = weights(r, pipe)
        shutil.copyfile(weights(r, exports / source), path)

    return mutate


def point_nowhere(r: random.Random, pipe: Path, _: Path) -> None:
    """Let the index name files that are not there, or nothing."""

    def change(index: dict) -> None:
        places = index["weight_map"]
        key = r.choice(sorted(places))
        kind = r.randrange(5)
        if kind == 0:
            places[key] = "nowhere.safetensors"
        elif kind == 1:
            index["weight_map"] = r.choice([{}, [], None, "x"])
        elif kind == 2:
            places[key] = r.choice([1, None])
        elif kind == 3:
            del index["weight_map"]
        else:
            gone = places[key]
            index["weight_map"] = {name: file for name, file in places.items() if file != gone}

    edit_json(pipe / "unet" / INDEX, change)


def empty(r: random.Random, pipe: Path, _: Path) -> None:
    """Empty a file."""
    r.choice(sorted(path for path in (pipe / "unet").iterdir())).write_bytes(b"")


def harmless(r: random.Random, pipe: Path, _: Path) -> None:
    """Write the same in another way: white space, order of keys, a renamed shard."""
    config = json.loads((pipe / "unet/config.json").read_text())
    shuffled = dict(r.sample(list(config.items()), len(config)))
    (pipe / "unet/config.json").write_text(json.dumps(shuffled, indent=r.choice([None, 1, 7])) + " \n" * r.randrange(9))
    path, index = weights(r, pipe), pipe / "unet" / INDEX
    edit_file(path, lambda header, _: header.update(note="x"))
    if index.is_file():
        new = f"diffusion_pytorch_model-{r.randrange(99)}.safetensors"
        path.rename(path.with_name(new))
        index.write_text(index.read_text().replace(path.name, new))


PACKED = "time_embedding.linear_1.packed"
MUTATIONS: dict[str, tuple[int, str, Mutation]] = {  # how many, of which exports, what is done
    "truncated": (24, "both", on_bytes(lambda r, data, _: data.__delitem__(slice(r.randrange(len(data)), None)))),
    "bit of the header flipped": (36, "both", on_bytes(lambda r, data, first: flip(r, data, 0, first))),
    "bit of the data flipped": (36, "both", on_bytes(lambda r, data, first: flip(r, data, first, len(data)))),
    "page lost": (10, "both", on_bytes(zero)),
    "bytes at the end": (4, "both", on_bytes(lambda r, data, _: data.extend(r.randbytes(r.randrange(1, 99))))),
    "tensor missing": (12, "both", on_tensors(lambda r, tensors, name: tensors.pop(name), signed=True)),
    "tensor renamed": (8, "both", on_tensors(lambda r, t, name: t.update({f"x.{name}": t.pop(name)}), signed=True)),
    "extra tensor": (8, "both", on_tensors(lambda r, t, name: t.update({f"x.{name}": t[name].clone()}), signed=True)),
    "wrong shape": (12, "both", on_tensors(reshape, signed=True)),
    "wrong dtype": (12, "both", on_tensors(cast, signed=False)),
    "tensors exchanged": (10, "both", on_tensors(swap, signed=False)),
    "other version in the header": (
        6,
        "both",
        on_table(lambda r, table, _: table.update(version=r.choice([0, 9, "1", None]))),
    ),
    "other version in the config": (
        6,
        "both",
        edit_config(lambda r, config: config["quantization_config"].update(version=r.choice([0, 9, "1", None]))),
    ),
    "no weights": (4, "both", lambda r, pipe, _: weights(r, pipe).unlink()),
    "dense weights": (4, "whole", replace("dense")),
    "weights of another model": (4, "whole", replace("wider")),
    "shard of another recipe": (8, "shards", replace("other")),
    "shard missing": (6, "shards", lambda r, pipe, _: weights(r, pipe).unlink()),
    "index points nowhere": (12, "shards", point_nowhere),
    "index not JSON": (6, "shards", lambda r, pipe, _: spoil(r, pipe / "unet" / INDEX)),
    "empty file": (8, "both", empty),
    "config not JSON": (12, "both", lambda r, pipe, _: spoil(r, pipe / "unet/config.json")),
    "another scheme of equal size": (10, "both", on_table(relabel)),
    "layer changed in the table": (14, "both", on_table(change_layer, signed=True)),
    "layer missing in the table": (
        6,
        "both",
        on_table(lambda r, table, _: table["layers"].pop(r.choice(sorted(table["layers"])))),
    ),
    "table of another model": (8, "both", on_table(foreign_table, signed=True)),
    "config says nothing": (
        6,
        "both",
        edit_config(
            lambda r, c: r.choice([lambda: c.pop("quantization_config"), lambda: c.update(quantization_config=None)])()
        ),
    ),
    "config says another method": (
        4,
        "both",
        edit_config(lambda r, c: c["quantization_config"].update(quant_method=r.choice(["quantdn", None, 3, "gguf"]))),
    ),
    "harmless": (10, "both", harmless),
}
# Here diffusers never asks quantdm: it leaves the model without weights, and load_pipeline is the remedy.
NOT_ASKED = "config says nothing"


def test_there_are_300_mutations() -> None:
    assert sum(count for count, _, _ in MUTATIONS.values()) >= 300


def attempt(load: Callable[[], nn.Module]) -> nn.Module | Exception:
    """Load a model; return it, or what was raised."""
    try:
        return load()
    except Exception as error:
        return error


def passed_quantdm(error: Exception) -> bool:
    """Tell whether an error came out of quantdm."""
    trace, home = error.__traceback__, str(Path(quantdm.__file__).parent)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(home):
            return True
        trace = trace.tb_next
    return False


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_mutated_export_is_one_clear_error_or_the_same_model(kind: str, exports: Path, tmp_path: Path) -> None:
    count, of, mutate = MUTATIONS[kind]
    expected = state(UNet2DModel.from_pretrained(exports / "whole" / "unet"))
    for seed, source in zip(range(count), cycle(["whole", "shards"] if of == "both" else [of]), strict=False):
        pipe = tmp_path / str(seed)
        shutil.copytree(exports / source, pipe)
        mutate(random.Random(f"{kind} {seed}"), pipe, exports)
        doors = [attempt(lambda pipe=pipe: load_pipeline(pipe).unet)]
        if kind != NOT_ASKED:
            doors.append(attempt(lambda pipe=pipe: UNet2DModel.from_pretrained(pipe / "unet")))
        for plain, found in enumerate(doors):
            if isinstance(found, nn.Module):
                assert state(found) == expected, f"seed {seed}: another model"
                continue
            assert kind != "harmless", found
            if plain and not isinstance(found, QuantDMError):  # what diffusers itself finds, before it asks quantdm
                assert not passed_quantdm(found), f"seed {seed}: {found!r}"
                continue
            assert isinstance(found, QuantDMError), f"seed {seed}: {found!r}"
            message = str(found)
            assert re.search(r"config|safetensors|layer|tensor|checkpoint|pipeline", message), message
            assert len(message.splitlines()) == 1, message
            assert len(message) < 600, message
