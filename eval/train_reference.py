# diffusers annotates its configs and outputs loosely.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Train the embedded reference pipelines from scikit-learn's digits: classifier, VAE, digits-dit, digits-sd.

    python eval/train_reference.py                    # everything, ~35 minutes on two cores
    python eval/train_reference.py --stage digits-dit # one stage (the VAE must exist)

Every stage is seeded, writes its loss to eval/results/train_reference/<stage>.jsonl and its model into the package.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from quantdm.files import read_json, write_json
from quantdm.hub.export import open_in_float32
from quantdm.metrics.classifier import WEIGHTS, DigitClassifier
from quantdm.pipelines.embedded.digits import IMAGE_SIZE, WORDS, load_digit_images

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = ROOT / "quantdm" / "denoisers" / "reference"
LOGS = ROOT / "eval" / "results" / "train_reference"
LATENT_CHANNELS, LATENT_SIZE = 4, 8
NULL_CLASS = 1000
DROP_CONDITION = 0.1
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


# ---------------------------------------------------------------------------------------------------------- training


def fit(
    stage: str,
    params: Iterable[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise `loss_of(generator)` with AdamW, warm-up and cosine decay; log the mean loss of every 50 steps."""
    LOGS.mkdir(parents=True, exist_ok=True)
    params = list(params)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    start, window = time.monotonic(), []
    with (LOGS / f"{stage}.jsonl").open("w") as log:
        for step in tqdm(range(1, steps + 1), desc=stage, mininterval=5):
            loss = loss_of(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()
            after_step()
            window.append(loss.item())
            if step % 50 == 0 or step == steps:
                record = {"step": step, "loss": sum(window) / len(window), "seconds": time.monotonic() - start}
                log.write(json.dumps({k: round(v, 6) for k, v in record.items()}) + "\n")
                log.flush()
                window = []


def batch_of(images: torch.Tensor, labels: torch.Tensor, size: int, g: torch.Generator):
    index = torch.randint(len(images), (size,), generator=g)
    return images[index], labels[index]


# -------------------------------------------------------------------------------------------------------- classifier


def augment(images: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Rotate, scale, shear and shift each image a little, then add noise."""
    n = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, generator=g) * 2 - 1) * limit

    angle, scale = uniform(0.25), 1 + uniform(0.15)
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale, -angle.sin() + uniform(0.15), uniform(0.12)], 1),
            torch.stack([angle.sin(), angle.cos() * scale, uniform(0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    noise = torch.randn(images.shape, generator=g) * 0.05
    return (moved + noise).clamp(0, 1)


def train_classifier(steps: int = 1500) -> None:
    images, labels = load_digit_images("train")
    model = DigitClassifier().train()

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(images, labels, 128, g)
        return F.cross_entropy(model(augment(x, g)), y, label_smoothing=0.05)

    fit("classifier", model.parameters(), loss_of, steps=steps, lr=3e-3, seed=1)
    model.eval()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, WEIGHTS)
    test_images, test_labels = load_digit_images("test")
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"classifier: test accuracy {accuracy:.4f} on {len(test_labels)} digits")


# --------------------------------------------------------------------------------------------------------------- VAE


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


def work_dir() -> Path:
    return Path(tempfile.gettempdir()) / "quantdm-train-reference"


def encoded_digits(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digit_images("train")
    with torch.no_grad():
        return vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor, labels


# --------------------------------------------------------------------------------------------------------- denoisers


def noise_loss(latents: torch.Tensor, scheduler: DDIMScheduler, predict: Callable, g: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted noise, timesteps stratified over the batch."""
    n, steps = len(latents), scheduler.config.num_train_timesteps
    noise = torch.randn(latents.shape, generator=g)
    u = (torch.arange(n) + torch.rand(n, generator=g)) / n
    t = (u * steps).long().clamp(max=steps - 1)
    return F.mse_loss(predict(scheduler.add_noise(latents, noise, t), t), noise)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, steps_offset=1)


def finish(pipe: DiTPipeline | StableDiffusionPipeline, name: str) -> None:
    pipe.to(torch.float16).save_pretrained(PIPELINES / name)
    open_in_float32(PIPELINES / name, pipe)
    for path in (PIPELINES / name).glob("*/config.json"):  # no path of this machine travels
        write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})
    size = sum(f.stat().st_size for f in (PIPELINES / name).rglob("*") if f.is_file())
    print(f"{name}: saved, {size / 1e6:.2f} MB")


def train_dit(steps: int = 4500, batch: int = 160) -> None:
    vae = AutoencoderKL.from_pretrained(work_dir() / "vae").eval()
    latents, labels = encoded_digits(vae)
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
            module.dropout_prob = 0.0  # the label is dropped below, once for all blocks
        if isinstance(module, nn.Embedding):
            module.weight.data.mul_(0.02)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = make_scheduler()

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(latents, labels, batch, g)
        y = torch.where(torch.rand(batch, generator=g) < DROP_CONDITION, NULL_CLASS, y)
        return noise_loss(x, scheduler, lambda xt, t: model(xt, timestep=t, class_labels=y).sample, g)

    fit(
        "digits-dit",
        model.parameters(),
        loss_of,
        steps=steps,
        lr=1e-3,
        seed=3,
        after_step=lambda: ema.step(model.parameters()),
    )
    ema.copy_to(model.parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data[10:NULL_CLASS] = 0.0  # never trained: stock DiTPipeline needs 1,001 rows
    pipe = DiTPipeline(model.eval(), vae, scheduler, id2label=dict(enumerate(WORDS)))
    finish(pipe, "digits-dit")


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


def train_sd(steps: int = 2800, batch: int = 96) -> None:
    vae = AutoencoderKL.from_pretrained(work_dir() / "vae").eval()
    latents, labels = encoded_digits(vae)
    tokenizer = train_tokenizer()
    width = 160
    text = CLIPTextModel(
        CLIPTextConfig(
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
    )
    model = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, width),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=width,
        attention_head_dim=5,
    )
    weights = [*model.parameters(), *text.parameters()]
    ema = EMAModel(weights, decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = make_scheduler()

    def tokens(prompts: list[str]) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    table = torch.stack([tokens([p.format(w) for p in PROMPTS]) for w in WORDS])  # [digit, template, token]
    empty = tokens([""])[0]

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(latents, labels, batch, g)
        template = torch.randint(len(PROMPTS), (batch,), generator=g)
        template[: batch // 2] = 0
        ids = table[y, template]
        ids[torch.rand(batch, generator=g) < DROP_CONDITION] = empty
        unique, inverse = ids.unique(dim=0, return_inverse=True)
        states = text(unique).last_hidden_state[inverse]
        return noise_loss(x, scheduler, lambda xt, t: model(xt, t, encoder_hidden_states=states).sample, g)

    fit("digits-sd", weights, loss_of, steps=steps, lr=1e-3, seed=4, after_step=lambda: ema.step(weights))
    ema.copy_to(weights)
    pipe = StableDiffusionPipeline(
        vae, text.eval(), tokenizer, model.eval(), scheduler, None, None, requires_safety_checker=False
    )
    finish(pipe, "digits-sd")


# --------------------------------------------------------------------------------------------------------------- main


def draw_losses() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = sorted(LOGS.glob("*.jsonl"))
    fig, axes = plt.subplots(1, len(files), figsize=(3.2 * len(files), 2.6), layout="constrained")
    for axis, file in zip(axes, files, strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        axis.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1)
        axis.set(title=f"{file.stem} ({rows[-1]['seconds'] / 60:.0f} min)", xlabel="step", yscale="log")
    fig.savefig(LOGS / "loss.png", dpi=110)


STAGES = {"classifier": train_classifier, "vae": train_vae, "digits-dit": train_dit, "digits-sd": train_sd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "plot"], help="train one stage only (default: all, in order)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage == "plot":
        return draw_losses()
    if args.stage:
        torch.manual_seed(0)  # weight initialisation; everything after draws from explicit generators
        return STAGES[args.stage]()

    def start(stage: str, threads: int) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, __file__, "--stage", stage, "--threads", str(threads)])

    for group in (("classifier", "vae"), ("digits-dit", "digits-sd")):  # one core each, two at a time
        processes = [start(stage, max(1, args.threads // 2)) for stage in group]
        if sum(process.wait() for process in processes):
            sys.exit(f"training failed in one of: {', '.join(group)}")
    draw_losses()


if __name__ == "__main__":
    main()
