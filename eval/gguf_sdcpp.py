"""Sample one step with stable-diffusion.cpp and with diffusers; a part of eval/gguf_readers.py."""

import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
PROMPT, TOKENS = "a", [49406, 320, *[49407] * 75]
TEXT, IMAGE = "cond_stage_model.transformer.text_model.", "first_stage_model."
SEED, SIDE = 42, 64
SAID = {"missing": "not in model file", "unknown": "unknown tensor", "wrong shape": "wrong shape"}  # in the log


def sd_cli(binary: Path, version: str, file: Path) -> dict[str, Any]:
    """Sample the smallest image in one step; return what the log says of the tensors, and how far the image is off."""
    image = file.with_suffix(".png")
    image.unlink(missing_ok=True)
    name = file.stem.rpartition("-")[0]
    other = whole_checkpoint(file.parent) if name == "sd-1.5" else single_parts(file.parent)
    command = [
        str(binary), *other, "--diffusion-model", str(file), "-o", str(image), "-p", PROMPT, "-v", "-t", "1",
        "-W", f"{SIDE}", "-H", f"{SIDE}", "--steps", "1", "--cfg-scale", "1", "-s", f"{SEED}", "--rng", "cpu",
        "--sampling-method", "euler", "--scheduler", "discrete",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    log = done.stdout + done.stderr
    file.with_suffix(".log").write_text(log)
    found: dict[str, Any] = {
        "version": version,
        "exit code": done.returncode,
        "model": "".join(re.findall(r"Version: (.+?)\s*$", log, re.MULTILINE)),
        "types": "".join(re.findall(r"Diffusion model weight type stat:\s*(.+?)\s*$", log, re.MULTILINE)),
        **{key: log.count(text) for key, text in SAID.items()},
    }
    if image.is_file():
        pixels = np.asarray(Image.open(image)).astype(np.float32)
        found["levels in the image"] = len(np.unique(pixels))
        for what, answers in (("diffusers", True), ("diffusers without a U-Net", False)) if name == "sd-1.5" else ():
            expected = reference(Path(other[1]), file.parent / "sd-1.5-diffusers.gguf", answers=answers)
            found[f"largest difference to {what}, of 255"] = float(np.abs(pixels - expected).max())
    return found


def whole_checkpoint(folder: Path) -> list[str]:
    """Make a checkpoint of SD 1.5 without its U-Net, of random weights, unless it is there; return the option for it.

    It is one file, because without a text encoder in `-m` the program takes no U-Net for one of SD 1.5.
    """
    file = folder / "checkpoint.safetensors"
    if not file.is_file():
        torch.manual_seed(0)
        save_half({**renamed(text_encoder(), TEXT), **renamed(image_decoder(), IMAGE)}, file)
    return ["-m", str(file)]


def single_parts(folder: Path) -> list[str]:
    """Make the smaller text encoder and the VAE of FLUX; return the options. It does without the other encoder."""
    clip, vae = folder / "clip.safetensors", folder / "vae.safetensors"
    if not vae.is_file():
        torch.manual_seed(0)
        save_half(renamed(text_encoder(), "text_model."), clip)
        save_half(renamed(image_decoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False), ""), vae)
    return ["--clip_l", str(clip), "--vae", str(vae)]


def renamed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return a model's state with another prefix."""
    return {prefix + name.removeprefix("text_model."): value for name, value in model.state_dict().items()}


def save_half(state: dict[str, torch.Tensor], file: Path) -> None:
    """Save weights in fp16."""
    save_file({name: value.half().contiguous() for name, value in state.items() if value.is_floating_point()}, file)


def text_encoder() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**CLIP)).eval()


def image_decoder(**other: Any) -> Any:
    return AutoencoderKL.from_config({**VAE, **other})


@torch.no_grad()
def reference(other: Path, file: Path, *, answers: bool) -> np.ndarray:
    """Return diffusers' image of one step of Euler on the decoded weights, [side, side, 3] in 0..255.

    Args:
        other: the checkpoint of the other parts.
        file: a GGUF file with diffusers' names.
        answers: whether the U-Net does; without it, the image shows how much hangs on it.
    """
    state = {name: value.float() for name, value in load_file(other).items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = float((1 - betas).prod())
    sigma = ((1 - kept) / kept) ** 0.5
    latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED)) * sigma
    if answers:
        text: Any = text_encoder()
        inner = "text_model." if any(name.startswith("text_model.") for name in text.state_dict()) else ""
        text.load_state_dict({inner + name.removeprefix(TEXT): state[name] for name in state if name.startswith(TEXT)})
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
        weights = dict(unet.named_parameters())
        for tensor in gguf.GGUFReader(file).tensors:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            weights[tensor.name].data.copy_(values.view(weights[tensor.name].shape))
        scaled = latents / (sigma**2 + 1) ** 0.5
        latents = latents - sigma * unet(scaled, torch.tensor([999.0]), text(torch.tensor([TOKENS]))[0])[0]
    vae = image_decoder()
    vae.load_state_dict({name.removeprefix(IMAGE): state[name] for name in state if name.startswith(IMAGE)})
    made = vae.decode(latents / 0.18215)[0]
    return ((made / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()
