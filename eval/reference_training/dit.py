# diffusers annotates its configs and outputs loosely.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""digits-dit: a diffusion transformer conditioned on the digit."""

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import nn

from quantdm.pipelines.embedded.digits import WORDS

from .common import batch_of
from .denoiser import DROP_CONDITION, LATENT_SIZE, finish, fit_averaged, load_latents, make_scheduler, noise_loss
from .vae import LATENT_CHANNELS

NULL_CLASS = 1000


def train_dit(steps: int = 4500, batch: int = 160) -> None:
    vae, latents, labels = load_latents()
    model = make_transformer()
    scheduler = make_scheduler()

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(latents, labels, batch, g)
        y = torch.where(torch.rand(batch, generator=g) < DROP_CONDITION, NULL_CLASS, y)
        return noise_loss(x, scheduler, lambda xt, t: model(xt, timestep=t, class_labels=y).sample, g)

    fit_averaged("digits-dit", model.parameters(), loss_of, steps=steps, seed=3)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data[10:NULL_CLASS] = 0.0  # never trained: stock DiTPipeline needs 1,001 rows
    finish(DiTPipeline(model.eval(), vae, scheduler, id2label=dict(enumerate(WORDS))), "digits-dit")


def make_transformer() -> DiTTransformer2DModel:
    """Build the transformer, with small label embeddings and no dropout of its own."""
    model = DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        sample_size=LATENT_SIZE,
        patch_size=2,
        dropout=0.0,
    )
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # the training drops the label, once for all blocks
        if isinstance(module, nn.Embedding):
            module.weight.data.mul_(0.02)
    return model
