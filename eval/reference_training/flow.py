# diffusers annotates its configs and outputs loosely.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""digits-flow: a small Stable Diffusion 3, trained by flow matching, with two CLIP text encoders and no T5."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextModelWithProjection

from .common import batch_of
from .denoiser import LATENT_SIZE, finish, fit_averaged, load_latents
from .sd import prompt_drawer, text_config, train_tokenizer
from .vae import LATENT_CHANNELS

WIDTH, TEXT_WIDTH = 160, 80  # of the transformer; of each text encoder
EMPTY_TOKENS = 256  # what the pipeline appends in place of T5's, unless `max_sequence_length` says how many


class _OneForMany(TorchFunctionMode):
    """Let the last key of an attention count for `many`.

    Without T5 the pipeline appends equal tokens of zeros. They stay equal in every layer, so one of them with the log
    of their number added to its scores trains the same network at an eighth of the cost.
    """

    def __init__(self, many: float) -> None:
        super().__init__()
        self.bias = math.log(many)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bias = torch.zeros(args[1].shape[-2])
            bias[-1] = self.bias
            kwargs["attn_mask"] = bias[None, None, None]
        return func(*args, **kwargs)


def train_flow(steps: int = 3500, batch: int = 96) -> None:
    vae, latents, labels = load_latents()
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    tokenizer = train_tokenizer()
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, TEXT_WIDTH)) for _ in range(2)]
    model = make_transformer()

    draw_prompts = prompt_drawer(tokenizer)

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(latents, labels, batch, g)
        unique, inverse = draw_prompts(y, g)
        states, pooled = (part[inverse] for part in encoded(encoders, unique))
        noise = torch.randn(x.shape, generator=g)
        s = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch).view(-1, 1, 1, 1)
        many = EMPTY_TOKENS ** float(torch.rand(1, generator=g))  # one is enough, and cheap; 256 are the default
        with _OneForMany(many), torch.autocast("cpu", torch.bfloat16):  # a quarter less time
            velocity = model(
                (1 - s) * x + s * noise,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=1000 * s.flatten(),
            ).sample
        return F.mse_loss(velocity.float(), noise - x)

    weights = [*model.parameters(), *(weight for encoder in encoders for weight in encoder.parameters())]
    fit_averaged("digits-flow", weights, loss_of, steps=steps, seed=5)
    first, second = (encoder.eval() for encoder in encoders)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(
        model.eval(), scheduler, vae, first, tokenizer, second, tokenizer, text_encoder_3=None, tokenizer_3=None
    )
    finish(pipe, "digits-flow")


def encoded(encoders: list[CLIPTextModelWithProjection], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token states, one empty token behind them, and pooled states, as StableDiffusion3Pipeline makes them."""
    outs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    pooled = torch.cat([out.text_embeds for out in outs], dim=-1)
    return torch.cat([states, torch.zeros_like(states[:, :1])], dim=1), pooled


def make_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
    )
