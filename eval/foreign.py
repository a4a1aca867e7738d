"""Something nobody here trained: the one-step consistency U-Net in the PyPI package `adaptive-terrain-diffusion` (MIT).

    pip download --no-deps adaptive-terrain-diffusion==0.4.2 && unzip adaptive_terrain_diffusion-0.4.2-*.whl -d terrain
    pip install --target onnx-packages --no-deps onnx onnxruntime protobuf flatbuffers ml_dtypes
    python eval/foreign.py terrain -o foreign --packages onnx-packages        # read, compare with onnxruntime, save
    quantdm run foreign --target-bits 3 --protocol eval/foreign.yaml          # the whole corridor on it

OpenAI's layout of 10.5 million weights (128 x 128 x 1, sigma from .002 to 80, 28 attentions) fits diffusers' own
UNet2DModel and ConsistencyModelPipeline: each of its hundred difficulties becomes a class, whose embedding is what its
two-layer network answers. Writes eval/results/foreign_equality.json.
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

from quantdm.files import write_json
from quantdm.machine import versions

MODEL = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
OUT = Path(__file__).parent / "results" / "foreign_equality.json"
CLASSES, SIDE, LEVELS, BLOCKS = 100, 128, 5, 4
SIGMAS = (0.01, 0.5, 5.0, 80.0)
TOLERANCE = 1e-4
State = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the unpacked wheel")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where the pipeline is saved")
    parser.add_argument("--packages", type=Path, help="folder of onnx and onnxruntime")
    arguments = parser.parse_args()
    if arguments.packages is not None:
        sys.path.append(str(arguments.packages))
    path = arguments.package / MODEL
    pipe = pipeline_of(tensors_of(path))
    found = compare(pipe.unet, path)
    print(found)
    if max(found["largest_difference"].values()) > TOLERANCE:
        raise SystemExit(f"error: {path}: differs from onnxruntime by more than {TOLERANCE}")
    pipe.save_pretrained(arguments.out)
    record = {
        "version": 1,
        **found,
        "weights": sum(p.numel() for p in pipe.unet.parameters()),
        "versions": versions(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(OUT, record)
    print(f"pipeline: {arguments.out}")


# -------------------------------------------------------------------------------------------------- reading the weights


def tensors_of(path: Path) -> State:
    """Return the tensors of the ONNX file by their names in OpenAI's layout.

    Convolutions and linear layers kept their names. The scale and shift of a norm became constants of a product and a
    sum, whose place in the network is written beside these.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

    graph = onnx.load(path).graph
    values = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in graph.initializer}
    found = {name.removeprefix("network."): v for name, v in values.items() if name.startswith("network.")}
    for node in graph.node:
        constant = next((i for i in node.input if i in values and values[i].shape[1:] == (1, 1)), None)
        place = next((p.value for p in node.metadata_props if p.key == "namespace"), "")
        if constant is not None and node.op_type in ("Mul", "Add") and "GroupNorm" in place:
            module = next(part for part in reversed(place.split("/")) if "GroupNorm" in part).partition(":")[0]
            kind = "weight" if node.op_type == "Mul" else "bias"
            module = module.removeprefix("network.").replace(".slice(None, -1, None)", "")  # all but the convolution
            found[f"{module}.{kind}"] = values[constant].flatten()
    return found


def pipeline_of(source: State) -> ConsistencyModelPipeline:
    """Return the network as a pipeline of diffusers."""
    unet = UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=BLOCKS, num_class_embeds=CLASSES,
        block_out_channels=(32, 32, 64, 96, 128), attention_head_dim=32, norm_num_groups=32, attn_norm_num_groups=32,
        down_block_types=(*("ResnetDownsampleBlock2D",) * 2, *("AttnDownBlock2D",) * 3),
        up_block_types=(*("AttnUpBlock2D",) * 3, *("ResnetUpsampleBlock2D",) * 2), downsample_type="resnet",
        upsample_type="resnet", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    unet.load_state_dict(renamed(source))
    return ConsistencyModelPipeline(unet.eval(), CMStochasticIterativeScheduler())


def renamed(source: State) -> State:
    """Return the tensors by their names in UNet2DModel; every tensor has a place, and none is left."""
    left = dict(source)
    new: State = {}
    for name, other in plain_names().items():
        for kind in ("weight", "bias"):
            new[f"{other}.{kind}"] = left.pop(f"{name}.{kind}")
    for name, other in attention_names().items():
        for kind in ("weight", "bias"):
            qkv = left.pop(f"{name}.qkv.{kind}").flatten(1) if kind == "weight" else left.pop(f"{name}.qkv.{kind}")
            for letter, part in zip("qkv", qkv.chunk(3), strict=True):
                new[f"{other}.to_{letter}.{kind}"] = part
            out = left.pop(f"{name}.proj_out.{kind}")
            new[f"{other}.to_out.0.{kind}"] = out.flatten(1) if kind == "weight" else out
            new[f"{other}.group_norm.{kind}"] = left.pop(f"{name}.norm.{kind}")
    new["class_embedding.weight"] = embeddings({k: left.pop(k) for k in [*left] if k.startswith("label_emb.")})
    if left:
        raise SystemExit(f"error: the file holds {', '.join([*left][:3])}, which have no place in UNet2DModel")
    return new


def embeddings(network: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what the label network answers to each difficulty: 1 to 100 on a scale from 0 to 1, [100, 128]."""
    x = torch.linspace(0, 1, CLASSES)[:, None] @ network["label_emb.0.weight"].T + network["label_emb.0.bias"]
    return torch.nn.functional.silu(x) @ network["label_emb.2.weight"].T + network["label_emb.2.bias"]


def places() -> tuple[dict[str, str], dict[str, str]]:
    """Return residual blocks and attentions of both halves: OpenAI's name -> that of UNet2DModel."""
    blocks, attentions = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}, {}
    attentions["middle_block.1"] = "mid_block.attentions.0"
    for level in range(LEVELS):
        for i in range(BLOCKS):
            at = 1 + level * (BLOCKS + 1) + i
            blocks[f"input_blocks.{at}.0"] = f"down_blocks.{level}.resnets.{i}"
            if level >= 2:
                attentions[f"input_blocks.{at}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < LEVELS - 1:
            blocks[f"input_blocks.{(level + 1) * (BLOCKS + 1)}.0"] = f"down_blocks.{level}.downsamplers.0"
        for i in range(BLOCKS + 1):
            at = level * (BLOCKS + 1) + i
            blocks[f"output_blocks.{at}.0"] = f"up_blocks.{level}.resnets.{i}"
            if level < 3:
                attentions[f"output_blocks.{at}.1"] = f"up_blocks.{level}.attentions.{i}"
        if level < LEVELS - 1:
            last = level * (BLOCKS + 1) + BLOCKS
            blocks[f"output_blocks.{last}.{2 if level < 3 else 1}"] = f"up_blocks.{level}.upsamplers.0"
    return blocks, attentions


def plain_names() -> dict[str, str]:
    """Return the layers that only change their name."""
    names = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    }  # fmt: skip
    parts = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    }  # fmt: skip
    known = _reference_names()
    for name, other in places()[0].items():
        names |= {f"{name}.{a}": f"{other}.{b}" for a, b in parts.items()}
        if f"{other}.conv_shortcut.weight" in known:
            names[f"{name}.skip_connection"] = f"{other}.conv_shortcut"
    return names


def attention_names() -> dict[str, str]:
    """Return the attentions."""
    return places()[1]


def _reference_names() -> set[str]:
    """Return where UNet2DModel has a shortcut: where a block changes its number of channels."""
    changes = {f"down_blocks.{level}.resnets.0" for level in (2, 3, 4)}
    changes |= {f"up_blocks.{level}.resnets.{i}" for level in range(LEVELS) for i in range(BLOCKS + 1)}
    return {f"{name}.conv_shortcut.weight" for name in changes}


# ------------------------------------------------------------------------------------------------------------ comparing


@torch.no_grad()
def compare(unet: UNet2DModel, path: Path) -> dict[str, Any]:
    """Return the largest difference between onnxruntime and diffusers, network and scheduler, at several sigmas."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = torch.Generator().manual_seed(0)
    scheduler = CMStochasticIterativeScheduler()
    found = {}
    for sigma in SIGMAS:
        classes = torch.tensor([0, 41, 99])
        noisy = sigma * torch.randn(3, 1, SIDE, SIDE, generator=rng)
        feeds = {"noisy": noisy.numpy(), "sigma": np.full(3, sigma, np.float32)}
        feeds["difficulty"] = (classes / (CLASSES - 1)).numpy().astype(np.float32)
        theirs = torch.from_numpy(session.run(["denoised"], feeds)[0])
        t = torch.full((3,), 250 * float(np.log(sigma)))
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma))
        f = unet(noisy / (sigma**2 + 0.25) ** 0.5, t, class_labels=classes).sample
        ours = (c_skip * noisy + c_out * f).clamp(-1, 1)
        found[str(sigma)] = (ours - theirs).abs().max().item()
    return {"largest_difference": found, "onnxruntime": onnxruntime.__version__, "images": 3, "range": [-1, 1]}


if __name__ == "__main__":
    main()
