"""Pipelines of the papers: LDM-4 with classes, which diffusers lacks, and tiny random ones for dry runs."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    ImagePipelineOutput,
    ModelMixin,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from quantdm import load_pipeline


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One token per class; the last one stands for no class."""

    @register_to_config
    def __init__(self, classes: int = 1000, width: int = 512) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Return [N, 1, width]."""
        return self.table(labels)[:, None]


class ClassLDMPipeline(DiffusionPipeline):
    """LDM-4 of classes: a U-Net on the latents of a VQ model that attends to one token (Rombach et al. 2022)."""

    model_cpu_offload_seq = "embedder->unet->vqvae"

    def __init__(
        self, vqvae: VQModel, unet: UNet2DConditionModel, embedder: ClassEmbedder, scheduler: DDIMScheduler
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, embedder=embedder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 250,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Return one image per class label."""
        device, config = self._execution_device, self.unet.config
        labels = torch.tensor(class_labels, device=device)
        none = torch.full_like(labels, self.embedder.config["classes"])
        tokens = self.embedder(torch.cat([none, labels])).to(self.unet.dtype)
        shape = (len(labels), config["in_channels"], config["sample_size"], config["sample_size"])
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):  # pyright: ignore
            without, with_ = self.unet(torch.cat([x, x]), t, encoder_hidden_states=tokens).sample.chunk(2)
            e = without + guidance_scale * (with_ - without)
            # with a list of generators the scheduler's own noise would need one: it takes the noise ready-made
            noise = randn_tensor(shape, generator=generator, device=device, dtype=e.dtype) if eta > 0 else None
            x = self.scheduler.step(e, t, x, eta=eta, variance_noise=noise).prev_sample
        pixels = (self.vqvae.decode(x).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        images = self.numpy_to_pil(pixels) if output_type == "pil" else pixels
        return ImagePipelineOutput(images=images) if return_dict else (images,)


# ----------------------------------------------------------------------------------------------------------- tiny ones

_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
_CLIP: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _vae() -> AutoencoderKL:
    blocks: dict[str, Any] = {  # diffusers types tuples of one
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return AutoencoderKL(**blocks, norm_num_groups=4, layers_per_block=1)


def _tokenizer() -> Any:
    return load_pipeline("digits-sd").tokenizer


def _t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))


def _pixart(cls: Any) -> DiffusionPipeline:
    words = _tokenizer()
    net = PixArtTransformer2DModel(
        **_SIZES, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler()
    return cls(tokenizer=words, text_encoder=_t5(len(words)), vae=_vae(), transformer=net, scheduler=scheduler)


def _hunyuan() -> DiffusionPipeline:
    words = _tokenizer()
    sizes: dict[str, Any] = {**_SIZES, "num_layers": 4}
    net = HunyuanDiT2DModel(
        **sizes, in_channels=4, hidden_size=16, mlp_ratio=2.0, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=77, text_len_t5=256, learn_sigma=True,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    bert = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=96, **_CLIP))
    return HunyuanDiTPipeline(
        vae=_vae(), text_encoder=bert, tokenizer=words, transformer=net, scheduler=DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # pyright: ignore
        text_encoder_2=_t5(len(words)), tokenizer_2=words,
    )  # fmt: skip


def _sdxl() -> DiffusionPipeline:
    words = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=16, projection_dim=16, eos_token_id=words.eos_token_id, **_CLIP
    )
    net = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[2, 4], transformer_layers_per_block=[1, 2],  # pyright: ignore[reportArgumentType]
        addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=words, tokenizer_2=words, unet=net, scheduler=EulerDiscreteScheduler(),  # pyright: ignore
        add_watermarker=False,
    )  # fmt: skip


def _dit() -> DiffusionPipeline:
    net = DiTTransformer2DModel(**_SIZES, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    return DiTPipeline(transformer=net, vae=_vae(), scheduler=DDIMScheduler())  # pyright: ignore[reportArgumentType]


def _ldm() -> DiffusionPipeline:
    vq = VQModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=3, num_vq_embeddings=16,
        norm_num_groups=4,
    )  # fmt: skip
    net = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return ClassLDMPipeline(vqvae=vq, unet=net, embedder=ClassEmbedder(1000, 16), scheduler=DDIMScheduler())


TINY = {
    "pixart-alpha": lambda: _pixart(PixArtAlphaPipeline), "pixart-sigma": lambda: _pixart(PixArtSigmaPipeline),
    "hunyuan-dit": _hunyuan, "sdxl": _sdxl, "dit": _dit, "ldm-4": _ldm,
}  # fmt: skip
TINY_RESOLUTION = 16


def tiny(name: str) -> DiffusionPipeline:
    """Return a tiny random pipeline of the class of a paper's model; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # ours alone: the state of the generator is put back
        pipe = TINY[name]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
