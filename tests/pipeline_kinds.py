"""Tiny pipelines of every kind that a protocol serves, with a protocol for each."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from quantdm import Protocol, load_pipeline


def unet(**settings: Any) -> UNet2DModel:
    """Return a tiny random U-Net on pixels."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **settings,
    ).eval()  # fmt: skip


def sd_parts() -> dict[str, Any]:
    """Return the parts of the embedded Stable Diffusion."""
    return {k: v for k, v in load_pipeline("digits-sd").components.items() if k != "image_encoder"}


def controlled() -> DiffusionPipeline:
    """Return a text-to-image pipeline with a ControlNet that has something to say."""
    parts = sd_parts()
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8, 16))
    for layer in net.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.05)
    return StableDiffusionControlNetPipeline(**parts, controlnet=net.eval(), requires_safety_checker=False)


def animated() -> DiffusionPipeline:
    """Return a text-to-video pipeline: the embedded U-Net with random motion modules."""
    parts = sd_parts()
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=tuple(parts["unet"].config.block_out_channels), motion_layers_per_block=1,
        motion_norm_num_groups=16, motion_num_attention_heads=2,
    )  # fmt: skip
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return AnimateDiffPipeline(**kept, motion_adapter=adapter.eval())


class BarePipeline(DiffusionPipeline):
    """A pipeline of its own kind: no generator, no steps, no guidance, no kind of output; pictures come out."""

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, strength: float = 1.0):
        """Return one image."""
        x = strength * torch.randn(1, 3, 16, 16)
        x = self.unet(x, torch.tensor(5)).sample.clamp(-1, 1) / 2 + 0.5
        return ImagePipelineOutput(images=self.numpy_to_pil(x.permute(0, 2, 3, 1).numpy()))


def consistency() -> DiffusionPipeline:
    """Return a class-conditional consistency model."""
    return ConsistencyModelPipeline(unet(num_class_embeds=10), CMStochasticIterativeScheduler(num_train_timesteps=40))


PROMPTS = {"argument": "prompt", "values": ["a handwritten one", "a handwritten two", "a handwritten six"]}
SCENES = {"drawn": "scene", "count": 3}

# Kind -> what makes its pipeline, and what its protocol says beside version, features and steps.
KINDS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    "text-to-image": (
        lambda: load_pipeline("digits-sd"),
        {**PROMPTS, "guidance_scale": 2.0, "call": {"negative_prompt": ["a seven", ""]}},
    ),
    "class-conditional": (
        lambda: load_pipeline("digits-dit"),
        {"argument": "class_labels", "values": [3, 5, 8], "guidance_scale": 1.5},
    ),
    "ddpm": (lambda: DDPMPipeline(unet(), DDPMScheduler()), {"argument": "none"}),
    "ddim": (lambda: DDIMPipeline(unet(), DDIMScheduler()), {"call": {"eta": [0.0, 0.5]}}),
    "consistency": (consistency, {"argument": "class_labels", "values": [1, 2, 3], "steps": 1}),
    "image-to-image": (
        lambda: StableDiffusionImg2ImgPipeline(**sd_parts(), requires_safety_checker=False),
        {**PROMPTS, "call": {"image": SCENES, "strength": 0.8}, "guidance_scale": 2.0, "steps": 3},
    ),
    "inpainting": (
        lambda: StableDiffusionInpaintPipeline(**sd_parts(), requires_safety_checker=False),
        {
            "rows": [
                {"prompt": text, "image": {"drawn": "scene", "number": i}, "mask_image": {"drawn": "mask", "number": i}}
                for i, text in enumerate(PROMPTS["values"])
            ],
            "call": {"height": 32, "width": 32},
            "guidance_scale": 2.0,
        },
    ),
    "controlnet": (controlled, {**PROMPTS, "call": {"image": {"drawn": "edges", "count": 3}}}),
    "video": (animated, {**PROMPTS, "call": {"num_frames": 3, "height": 32, "width": 32}}),
    "bare": (lambda: BarePipeline(unet(), DDPMScheduler()), {"steps": 1, "call": {"strength": [1.0, 0.5]}}),
}


def make(kind: str) -> tuple[DiffusionPipeline, Protocol]:
    """Return a tiny pipeline of that kind and its protocol."""
    build, said = KINDS[kind]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe, Protocol(**{"version": 2, "steps": 2, "features": "pyramid", **said})


def picture(path: Any, size: tuple[int, int] = (32, 32), shade: int = 90) -> str:
    """Write a small picture and return its name."""
    from PIL import Image

    noise = np.random.default_rng(shade).integers(0, 60, (size[1], size[0], 3)) + shade
    Image.fromarray(noise.astype(np.uint8)).save(path)
    return path.name
