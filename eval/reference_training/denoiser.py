# diffusers annotates its configs and outputs loosely.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""What the trainings of both denoisers share: latents, the loss, the averaged weights, the saved pipeline."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import nn

from quantdm.files import read_json, write_json
from quantdm.hub.export import open_in_float32

from .common import ROOT, fit, work_dir
from .vae import encoded_digits

PIPELINES = ROOT / "quantdm" / "pipelines" / "embedded"
LATENT_SIZE = 8
DROP_CONDITION = 0.1


def load_latents() -> tuple[AutoencoderKL, torch.Tensor, torch.Tensor]:
    """Return the trained autoencoder, the latents of the training digits and their labels."""
    vae = AutoencoderKL.from_pretrained(work_dir() / "vae").eval()
    return vae, *encoded_digits(vae)


def noise_loss(latents: torch.Tensor, scheduler: DDIMScheduler, predict: Callable, g: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted noise, timesteps stratified over the batch."""
    n, steps = len(latents), scheduler.config.num_train_timesteps
    noise = torch.randn(latents.shape, generator=g)
    u = (torch.arange(n) + torch.rand(n, generator=g)) / n
    t = (u * steps).long().clamp(max=steps - 1)
    return F.mse_loss(predict(scheduler.add_noise(latents, noise, t), t), noise)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, steps_offset=1)


def fit_averaged(
    stage: str,
    weights: Iterable[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    seed: int,
) -> None:
    """Train weights, and leave them at their moving average."""
    weights = list(weights)
    ema = EMAModel(weights, decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    fit(stage, weights, loss_of, steps=steps, lr=1e-3, seed=seed, after_step=lambda: ema.step(weights))
    ema.copy_to(weights)


def finish(pipe: DiTPipeline | StableDiffusionPipeline | StableDiffusion3Pipeline, name: str) -> None:
    pipe.to(torch.float16).save_pretrained(PIPELINES / name)
    open_in_float32(PIPELINES / name, pipe)
    for path in (PIPELINES / name).glob("*/config.json"):  # no path of this machine travels
        write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})
    size = sum(f.stat().st_size for f in (PIPELINES / name).rglob("*") if f.is_file())
    print(f"{name}: saved, {size / 1e6:.2f} MB")
