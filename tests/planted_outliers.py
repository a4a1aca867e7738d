"""Plant outlier channels in a denoiser without changing its function: a test-bed that small models lack."""

import torch
from torch import nn

SHARE, FACTOR = 0.02, 30.0


@torch.no_grad()
def plant_outliers_(denoiser: nn.Module, *, share: float = SHARE, factor: float = FACTOR, seed: int = 0) -> list[str]:
    """Scale some channels up where the next weight can scale them down again; return the layers with outliers.

    Value channels against the input of the output projection; the modulation of a DiT block, or the affine norms of a
    U-Net's, against the next linear.
    """
    generator = torch.Generator().manual_seed(seed)
    planted = []
    for name, module in denoiser.named_modules():
        if all(hasattr(module, part) for part in ("to_q", "to_k", "to_v", "to_out")):
            picked = _picked(module.to_v.out_features, share, generator)
            _scale_rows_(module.to_v, picked, factor)
            module.to_out[0].weight[:, picked] /= factor
            planted.append(f"{name}.to_out.0")
        if _has_affine_norms(module):
            for norm, targets in (("norm1", ("attn1.to_q", "attn1.to_k", "attn1.to_v")), ("norm3", ("ff.net.0.proj",))):
                affine = module.get_submodule(norm)
                picked = _picked(affine.weight.numel(), share, generator)
                affine.weight[picked] *= factor
                affine.bias[picked] *= factor
                for target in targets:
                    module.get_submodule(target).weight[:, picked] /= factor
                    planted.append(f"{name}.{target}")
        if _is_dit_block(module):
            for chunk, targets in ((0, ("attn1.to_q", "attn1.to_k", "attn1.to_v")), (3, ("ff.net.0.proj",))):
                planted += [f"{name}.{target}" for target in targets]
                width = module.attn1.to_q.in_features
                picked = _picked(width, share, generator)
                _plant_modulation_(module, chunk, picked, factor, width)
                for target in targets:
                    module.get_submodule(target).weight[:, picked] /= factor
    return planted


def _has_affine_norms(module: nn.Module) -> bool:
    """Tell whether this is a transformer block of a U-Net, whose norms have weights of their own."""
    norms = [getattr(module, name, None) for name in ("norm1", "norm3")]
    return hasattr(module, "ff") and all(getattr(norm, "weight", None) is not None for norm in norms)


def _is_dit_block(module: nn.Module) -> bool:
    return hasattr(getattr(module, "norm1", None), "linear") and hasattr(module, "ff")


def _plant_modulation_(block: nn.Module, chunk: int, picked: torch.Tensor, factor: float, width: int) -> None:
    """Make the block multiply its normed input by `factor` in these channels: shift·f and (1 + scale)·f - 1."""
    linear = block.norm1.linear
    shift, scale = chunk * width + picked, (chunk + 1) * width + picked
    linear.weight[shift] *= factor
    linear.bias[shift] *= factor
    linear.weight[scale] *= factor
    linear.bias[scale] = factor * (linear.bias[scale] + 1) - 1


def _scale_rows_(layer: nn.Linear, rows: torch.Tensor, factor: float) -> None:
    layer.weight[rows] *= factor
    if layer.bias is not None:
        layer.bias[rows] *= factor


def _picked(count: int, share: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[: max(1, round(share * count))]
