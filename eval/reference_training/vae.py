# diffusers annotates its configs and outputs loosely.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The autoencoder that both reference pipelines share."""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from quantdm.pipelines.embedded.digits import IMAGE_SIZE, load_digit_images

from .common import batch_of, fit, work_dir

LATENT_CHANNELS = 4


def train_vae(steps: int = 1200) -> None:
    images, labels = load_digit_images("train")
    images = images * 2 - 1
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    ).train()

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, _ = batch_of(images, labels, 48, g)
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample(generator=g)).sample
        return F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x) + 2e-5 * posterior.kl().mean()

    fit("vae", vae.parameters(), loss_of, steps=steps, lr=2e-3, seed=2)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        test = load_digit_images("test")[0] * 2 - 1
        psnr = 10 * math.log10(4 / F.mse_loss(vae.decode(vae.encode(test).latent_dist.mean).sample, test).item())
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.half().save_pretrained(work_dir() / "vae")
    print(f"vae: test PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}")


def encoded_digits(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digit_images("train")
    with torch.no_grad():
        return vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor, labels
