"""Open GGUF files of quantdm with the programs that they are for: stable-diffusion.cpp, and ComfyUI with ComfyUI-GGUF.

    python eval/gguf_readers.py --sd-cli build/bin/sd-cli --comfyui ComfyUI --comfyui-python ComfyUI/venv/bin/python

Writes eval/results/gguf_readers.json. Weights are random, shapes those that the readers build their models with: the
whole U-Net of SD 1.5, FLUX.1 with one block of each kind, SD3 with two narrow blocks. ComfyUI's answer on given inputs
is compared with diffusers' on the decoded weights, everything in fp32; stable-diffusion.cpp samples one step with a
random text encoder and VAE. ComfyUI-GGUF is looked for in ComfyUI's custom_nodes. Takes 6 GB of memory.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from gguf_sdcpp import sd_cli
from safetensors.torch import load_file, save_file
from torch import nn

import quantdm
from quantdm.files import write_json
from quantdm.hub.gguf import NAMES, export_gguf
from quantdm.hub.gguf_names import Part, original_names
from quantdm.machine import cores
from quantdm.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "eval" / "results" / "gguf_readers.json"
# Class, configuration and the arguments of one call (name -> shape).
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "sd-1.5": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 768},
        {"sample": (1, 4, 16, 16), "encoder_hidden_states": (1, 8, 768)},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 32,
            "sample_size": 32, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        },
        {"hidden_states": (1, 16, 16, 16), "encoder_hidden_states": (1, 8, 4096), "pooled_projections": (1, 2048)},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
        {"hidden_states": (1, 16, 64), "encoder_hidden_states": (1, 8, 4096), "pooled_projections": (1, 768)},
    ),
}  # fmt: skip
# Published configurations, of which only names and shapes are compared with those of ComfyUI's models.
XL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "attention_head_dim": [5, 10, 20],
}  # fmt: skip
MMDIT = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "sample_size": 128}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "SD 2.1": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    ),
    "SDXL": ("UNet2DConditionModel", XL),
    "SDXL refiner": (
        "UNet2DConditionModel",
        {
            **XL, "block_out_channels": (384, 768, 1536, 1536), "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4, "cross_attention_dim": 1280,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "projection_class_embeddings_input_dim": 2560,
        },
    ),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.1-schnell": ("FluxTransformer2DModel", {}),
    "SD3 medium": (
        "SD3Transformer2DModel",
        {
            **MMDIT, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "SD3.5 medium": (
        "SD3Transformer2DModel",
        {
            **MMDIT, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        },
    ),
    "SD3.5 large": (
        "SD3Transformer2DModel",
        {
            **MMDIT, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
    ),
}  # fmt: skip
TIMESTEP = {"sd-1.5": 500.0, "sd3": 500.0, "flux": 0.5}
KEPT = {"sd-1.5": ("*conv*", "*proj_in", "*.proj_out"), "sd3": ("pos_embed.proj",), "flux": ()}  # as they are
SAMPLED = ("sd-1.5", "flux")  # stable-diffusion.cpp has one width for SD3
RULES = {"*to_k": "uniform-group32-8-symmetric", "*to_v": "uniform-group32-5-symmetric"}  # stacked with to_q
DEFAULT = "uniform-group32-4-symmetric"


class Lone(DiffusionPipeline):
    """A pipeline of nothing but a denoiser."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-cli", type=Path, help="the built program of stable-diffusion.cpp")
    parser.add_argument("--sd-version", default="", help="its version, where the program does not know it")
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI with custom_nodes/ComfyUI-GGUF")
    parser.add_argument("--comfyui-python", default=sys.executable, help="the interpreter that runs it")
    parser.add_argument("--folder", type=Path, default=Path(".gguf"), help="where the files are made")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {}
    record |= {"date": f"{datetime.date.today()}", "machine": f"{platform.machine()}, {cores()} cores"}
    record["recipe"] = {**RULES, "default": DEFAULT, "original": KEPT}
    record["versions"] = {name: importlib.metadata.version(name) for name in ("diffusers", "gguf", "torch")}
    if args.comfyui:
        record["names and shapes"] = compare_shapes(args.comfyui, args.comfyui_python, args.folder / "shapes.json")
    for name in args.models:
        made = folder_of(args.folder, name)
        found = record.setdefault(name, {}) | {"tensors": made}
        for names in NAMES:
            file = args.folder / f"{name}-{names}.gguf"
            if args.comfyui:
                found[f"ComfyUI, {names}"] = comfyui(args.comfyui, args.comfyui_python, file)
            if args.sd_cli and name in SAMPLED:
                found[f"stable-diffusion.cpp, {names}"] = sd_cli(args.sd_cli, args.sd_version, file)
            print(name, names, json.dumps(found), flush=True)
        record[name] = found
        write_json(OUT, record)
    write_json(OUT, record)


def folder_of(folder: Path, name: str) -> dict[str, dict[str, int]]:
    """Make a model's two files and what it answers, unless they are there; return type -> tensors of each."""
    counts = folder / f"{name}.json"
    if counts.is_file():
        return json.loads(counts.read_text())
    kind, config, shapes = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    model = getattr(diffusers, kind)(**config).eval()
    torch.set_default_dtype(torch.float32)
    rules: Any = {**RULES, **dict.fromkeys(KEPT[name], "original")}
    pipe = Lone(model)
    quantdm.apply_recipe(pipe, Recipe(model=name, patterns=rules, default=DEFAULT), insist=True)
    made = {names: export_gguf(pipe, folder / f"{name}-{names}.gguf", names=names) for names in NAMES}
    inputs = {key: torch.randn(shape) for key, shape in shapes.items()}
    save_file({**inputs, "answer": answer(model.float(), inputs, TIMESTEP[name])}, folder / f"{name}.safetensors")
    write_json(counts, made)
    return made


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, torch.Tensor], timestep: float) -> torch.Tensor:
    """Call the denoiser in diffusers."""
    more: dict[str, Any] = {}
    if isinstance(model, diffusers.FluxTransformer2DModel):
        side = int(inputs["hidden_states"].shape[1] ** 0.5)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros(side, side), rows, columns], dim=-1).view(-1, 3)
        texts = torch.zeros(inputs["encoder_hidden_states"].shape[1], 3)
        more = {"img_ids": places, "txt_ids": texts, "guidance": torch.tensor([3.5])}
    return model(**inputs, timestep=torch.tensor([timestep]), **more)[0].contiguous()


def compare_shapes(checkout: Path, python: str, file: Path) -> dict[str, Any]:
    """Ask ComfyUI which model it takes the original names and shapes of each architecture for."""
    told = {}
    for name, (kind, config) in SHAPES.items():
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**config)
        state = model.state_dict()
        layout = original_names(kind, dict(model.config), list(state))
        told[name] = {theirs: stacked_shape(parts, state) for theirs, parts in layout.items()}
    write_json(file, told)
    return run_comfyui(python, checkout, file)


def stacked_shape(parts: list[Part], state: dict[str, torch.Tensor]) -> list[int]:
    """Return the shape of what is made of these rows."""
    first, *rest = state[parts[0].name].shape
    return [sum(state[part.name].shape[0] // part.count for part in parts) if len(parts) > 1 else first, *rest]


def comfyui(checkout: Path, python: str, file: Path) -> dict[str, Any]:
    """Open a file with ComfyUI and compare what its model answers."""
    name = file.stem.rpartition("-")[0]
    given = file.with_name(f"{name}.safetensors")
    found = run_comfyui(python, checkout, file, given, TIMESTEP[name])
    if "failed" in found:
        return found
    expected, theirs = load_file(given)["answer"], load_file(given.with_suffix(".comfyui"))["answer"]
    found["largest difference by largest value"] = float((theirs - expected).abs().max() / expected.abs().max())
    return found


def run_comfyui(python: str, *arguments: object) -> dict[str, Any]:
    """Run the script for ComfyUI's interpreter; return what it prints, or its error."""
    command = [python, str(ROOT / "eval" / "gguf_comfyui.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
