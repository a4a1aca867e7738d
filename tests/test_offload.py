"""What people do with pipelines goes on working: offload, compile, autocast, any scheduler; outputs stay the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from quantdm.hub import apply_recipe
from quantdm.modules import dense_weights, packed_layers, set_residency
from tests.family_models import answer, make
from tests.hub_models import WEIGHTS as FILE
from tests.hub_models import equal_files, mixed_recipe, uniform_config

CPU = torch.device("cpu")


def quantized(family: str) -> nn.Module:
    """Return a tiny model with all methods and 2 to 8 bits in it."""
    model = make(family)
    return apply_recipe(model, mixed_recipe(model), insist=True)


OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "sequential": lambda model, _: accelerate.cpu_offload(model, CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "group by leaf": lambda model, _: apply_group_offloading(model, CPU, CPU, "leaf_level"),
    "group by block": lambda model, _: apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1),
    "group on disk": lambda model, folder: apply_group_offloading(
        model, CPU, CPU, "leaf_level", offload_to_disk_path=str(folder)
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", ["sd-1.5", "sd3"])
def test_an_offloaded_model_answers_bit_by_bit_alike(family: str, offload: str, tmp_path: Path) -> None:
    model = quantized(family)
    y = answer(model)
    OFFLOADS[offload](model, tmp_path / "weights")
    for _ in range(2):
        assert torch.equal(answer(model), y)


@pytest.mark.parametrize("residency", ["int8", "dense"])
@pytest.mark.parametrize("offload", ["sequential", "group by leaf"])
def test_a_residency_chosen_before_offloading_stays(offload: str, residency: Any, tmp_path: Path) -> None:
    model = make("sd3")
    apply_recipe(model, uniform_config(model), insist=True)
    y = answer(model)
    set_residency(model, residency)
    OFFLOADS[offload](model, tmp_path)
    assert torch.equal(answer(model), y)


def test_sequential_offload_takes_the_bytes_away_between_calls_and_gives_them_back(tmp_path: Path) -> None:
    model = quantized("sd3")
    model.save_pretrained(tmp_path / "before")
    y = answer(model)
    accelerate.cpu_offload(model, CPU)
    answer(model)
    assert all(layer.packed.is_meta for layer in packed_layers(model).values())
    remove_hook_from_submodules(model)
    assert torch.equal(answer(model), y)
    model.save_pretrained(tmp_path / "after")
    assert equal_files(tmp_path / "before" / FILE, tmp_path / "after" / FILE)


def latents_of(pipe: DiffusionPipeline, **options: Any) -> Tensor:
    """Run a pipeline without text encoders and decoder on fixed embeddings."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    config = pipe.components.get("transformer", pipe.components.get("unet")).config
    width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    options |= {"prompt_embeds": torch.randn(1, 5, width, generator=generator)}
    if not isinstance(pipe, FluxPipeline):  # guidance is distilled there
        options |= {"negative_prompt_embeds": torch.randn(1, 5, width, generator=generator)}
    if "pooled_projection_dim" in config:
        pooled = (1, config["pooled_projection_dim"])
        options |= {"pooled_prompt_embeds": torch.randn(pooled, generator=generator)}
        if not isinstance(pipe, FluxPipeline):
            options |= {"negative_pooled_prompt_embeds": torch.randn(pooled, generator=generator)}
    return pipe(height=64, width=64, num_inference_steps=3, generator=generator, output_type="latent", **options).images


def stable_diffusion(scheduler: Callable[[], Any]) -> Callable[[nn.Module], DiffusionPipeline]:
    """Return what makes a Stable Diffusion pipeline of a U-Net."""
    return lambda unet: StableDiffusionPipeline(
        None, None, None, unet, scheduler(), None, None, requires_safety_checker=False
    )


PIPELINES: dict[str, tuple[str, Callable[[nn.Module], DiffusionPipeline]]] = {
    "DDIM": ("sd-1.5", stable_diffusion(DDIMScheduler)),
    "Euler": ("sd-1.5", stable_diffusion(EulerDiscreteScheduler)),
    "DPM-Solver++": ("sd-1.5", stable_diffusion(DPMSolverMultistepScheduler)),
    "flow matching, SD 3": (
        "sd3",
        lambda model: StableDiffusion3Pipeline(
            model, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None
        ),
    ),
    "flow matching, FLUX": (
        "flux",
        lambda model: FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model),
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_answers_as_the_one_with_the_decoded_weights(name: str) -> None:
    family, assemble = PIPELINES[name]
    stock = latents_of(assemble(make(family)))
    model = quantized(family)
    y = latents_of(assemble(model))
    assert torch.isfinite(y).all()
    assert not torch.equal(y, stock)
    with dense_weights(model):
        assert torch.equal(latents_of(assemble(model)), y)
    assert torch.equal(latents_of(assemble(model.dequantize())), y)


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
        lambda pipe: pipe.to("cpu"),
    ],
    ids=["model", "group", "to"],
)
def test_an_offloaded_pipeline_answers_bit_by_bit_alike(offload: Callable[[DiffusionPipeline], Any]) -> None:
    family, assemble = PIPELINES["flow matching, SD 3"]
    pipe = assemble(quantized(family))
    y = latents_of(pipe)
    offload(pipe)
    assert torch.equal(latents_of(pipe), y)
    assert torch.equal(latents_of(pipe), y)


@pytest.mark.parametrize(("family", "residency"), [("sd-1.5", "packed"), ("flux", "int8"), ("sd3", "dense")])
def test_a_compiled_model_answers_bit_by_bit_alike(family: str, residency: Any) -> None:
    model = make(family)
    apply_recipe(model, uniform_config(model, "kmeans-channel-3"), insist=True)
    y = answer(model)
    set_residency(model, residency)
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(answer(model), y)


def test_blocks_compiled_one_by_one_answer_bit_by_bit_alike() -> None:
    model = quantized("flux")
    y = answer(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(answer(model), y)


@pytest.mark.parametrize("family", ["sd-1.5", "dit"])
def test_autocast_does_what_it_does_to_the_decoded_model(family: str) -> None:
    model = quantized(family)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = answer(model)
    assert not torch.equal(narrow, answer(model))  # it did something
    model.dequantize()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(model), narrow)
