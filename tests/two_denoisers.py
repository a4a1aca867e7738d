"""Pipelines with two denoisers: a tiny Wan 2.2, and a DiT with one transformer per range of noise levels."""

import copy

import torch
from diffusers import (
    AutoencoderKLWan,
    DiTPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from quantdm import load_pipeline


def make_wan() -> WanPipeline:
    """Return a tiny random Wan 2.2: `transformer` for the high noise levels, `transformer_2` for the low ones."""
    torch.manual_seed(0)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    text = UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=UMT5EncoderModel(text).eval(),
        transformer=WanTransformer3DModel(num_layers=2, **config).eval(),
        transformer_2=WanTransformer3DModel(num_layers=3, **config).eval(),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=0.9,
    )


class TwoExpertsPipeline(DiTPipeline):
    """A DiT pipeline, without guidance, whose second transformer takes over at the low noise levels."""

    BOUNDARY = 500

    def __init__(self, transformer, vae, scheduler, transformer_2, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label=id2label)
        self.register_modules(transformer_2=transformer_2)

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale, generator, num_inference_steps, output_type):
        """Return one image per class label."""
        size, channels = self.transformer.config.sample_size, self.transformer.config.in_channels
        labels = torch.tensor(class_labels)
        x = torch.cat([torch.randn(1, channels, size, size, generator=g) for g in generator]).to(self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            expert = self.transformer if t >= self.BOUNDARY else self.transformer_2
            noise = expert(x, timestep=t.expand(len(x)), class_labels=labels).sample[:, :channels]
            x = self.scheduler.step(noise, t, x).prev_sample
        images = self.vae.decode(x / self.vae.config.scaling_factor).sample / 2 + 0.5
        assert output_type == "np"
        return ImagePipelineOutput(images=images.clamp(0, 1).permute(0, 2, 3, 1).float().numpy())


def make_two_experts() -> TwoExpertsPipeline:
    """Return two slightly different copies of the embedded DiT as experts."""
    pipe = load_pipeline("digits-dit")
    second: nn.Module = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        second.proj_out_2.weight.mul_(1.01)  # type: ignore[union-attr,operator]
    made = TwoExpertsPipeline(pipe.transformer, pipe.vae, pipe.scheduler, second)
    made.set_progress_bar_config(disable=True)
    return made
