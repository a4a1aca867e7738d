# diffusers annotates its configs and outputs loosely.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""digits-sd: a small Stable Diffusion, with its text encoder and tokenizer."""

import json
from collections.abc import Callable

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from quantdm.pipelines.embedded.digits import WORDS

from .common import batch_of
from .denoiser import DROP_CONDITION, LATENT_SIZE, finish, fit_averaged, load_latents, make_scheduler, noise_loss
from .vae import LATENT_CHANNELS

WIDTH = 160
PROMPTS = (
    "a handwritten {}",
    "handwritten {}",
    "a {}",
    "{}",
    "the digit {}",
    "a handwritten digit {}",
    "a photo of the handwritten digit {}",
    "the number {}",
)


def train_sd(steps: int = 2800, batch: int = 96) -> None:
    vae, latents, labels = load_latents()
    tokenizer = train_tokenizer()
    text, model = CLIPTextModel(text_config(tokenizer, WIDTH)), make_unet()
    scheduler = make_scheduler()

    draw_prompts = prompt_drawer(tokenizer)

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(latents, labels, batch, g)
        unique, inverse = draw_prompts(y, g)
        states = text(unique).last_hidden_state[inverse]
        return noise_loss(x, scheduler, lambda xt, t: model(xt, t, encoder_hidden_states=states).sample, g)

    fit_averaged("digits-sd", [*model.parameters(), *text.parameters()], loss_of, steps=steps, seed=4)
    pipe = StableDiffusionPipeline(
        vae, text.eval(), tokenizer, model.eval(), scheduler, None, None, requires_safety_checker=False
    )
    finish(pipe, "digits-sd")


def prompt_drawer(
    tokenizer: CLIPTokenizer,
) -> Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]:
    """Return what draws a prompt for every digit: the distinct token rows, and which of them each digit has.

    The first half takes the first template; of all, a share has the empty prompt.
    """

    def tokens(prompts: list[str]) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    table = torch.stack([tokens([p.format(w) for p in PROMPTS]) for w in WORDS])  # [digit, template, token]
    empty = tokens([""])[0]

    def draw(digits: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        template = torch.randint(len(PROMPTS), (len(digits),), generator=g)
        template[: len(digits) // 2] = 0
        ids = table[digits, template]
        ids[torch.rand(len(digits), generator=g) < DROP_CONDITION] = empty
        return ids.unique(dim=0, return_inverse=True)

    return draw


def train_tokenizer() -> CLIPTokenizer:
    """Learn a small byte-pair vocabulary from the prompts (every letter and digit stays spellable)."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    corpus = [p.format(w) for p in PROMPTS for w in WORDS] * 4 + list(letters) + [" ".join(letters), letters]
    tokenizer = CLIPTokenizer(model_max_length=16)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=3,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=16)


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Return the configuration of a text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, WIDTH),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        attention_head_dim=5,
    )
