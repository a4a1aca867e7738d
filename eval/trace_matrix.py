"""Trace every denoiser class that the installed diffusers exports, and record which can be traced and why not.

python eval/trace_matrix.py                 # writes eval/results/trace_matrix.json; then eval/support_matrix.py
python eval/trace_matrix.py Wan LTXVideo    # only show the classes whose names contain one of these

A denoiser class is what diffusers exports, is a `torch.nn.Module`, and is defined among its transformers, U-Nets and
ControlNets or takes a noise level (an argument with `timestep` or `sigma` in its name, or `t`). A class counts as
traced where class and configuration alone give its graph. Configurations are the defaults with fewer layers, and with
what the defaults leave open (CONFIGS): on the meta device, widths cost nothing.
"""

import argparse
import datetime
import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from quantdm.denoisers.analysis import analyse
from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.pipelines.exported import exported

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "trace_matrix.json"
ROOMS = re.compile(r"diffusers\.models\.(transformers|unets|controlnets)\.")
NO_MODELS = ("Pipeline", "Scheduler", "Blocks")  # endings of exported names; opening all of these takes long
DEPTH = re.compile(r"(?:\w+_)?(?:n|num)_?(?:\w+_)?(?:layers|blocks)|\w*_?depth|layers_per_block|mmdit_layers")
LAYER_LISTS = re.compile(r"\w*(?:layers|layer_ids|layers_places)")
# What a default leaves open (None), by field.
OPEN = {"in_channels": 32, "patch_size": 2, "out_channels": 32}
# Class -> fields for which a default does not serve, because of fewer layers or because it is no working model.
CONFIGS: dict[str, dict[str, Any]] = {
    "ControlNetUnionModel": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "CosmosControlNetModel": {"num_attention_heads": 16},
    "CosmosTransformer3DModel": {"concat_padding_mask": False},  # resizing the mask takes torchvision
    "DreamLiteTransformer2DModel": {"cross_attention_dim": 64},
    "HiDreamImageTransformer2DModel": {
        "axes_dims_rope": (64, 32, 32), "caption_channels": [64, 64], "llama_layers": [0, 1, 0, 1],
    },
    "HunyuanDiT2DControlNetModel": {"hidden_size": 1408, "transformer_num_layers": 6},
    "HunyuanDiT2DModel": {"hidden_size": 1408},
    "HunyuanVideoFramepackTransformer3DModel": {"has_image_proj": True, "has_clean_x_embedder": True},
    "Kandinsky3UNet": {"layers_per_block": 3},
    "LatteTransformer3DModel": {
        "cross_attention_dim": 1408, "caption_channels": 64, "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
    },
    "Transformer2DModel": {"patch_size": None, "cross_attention_dim": 64},
    "UniDiffuserModel": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "text_dim": 64, "clip_img_dim": 64,
        "num_text_tokens": 12,
    },
    "UNet1DModel": {"extra_in_channels": 64},
    "WanAnimateTransformer3DModel": {"inject_face_latents_blocks": 1},
    "ZImageControlNetModel": {
        "control_in_dim": 32, "control_layers_places": [0, 1], "control_refiner_layers_places": [0, 1],
    },
}  # fmt: skip
A_LIST = "a list of ControlNets without weights or configuration of its own; its members are traced one by one"
A_PART = "a part of another model: it cannot run by itself; its layers are traced as layers of {}"
# Class -> why it cannot be traced, where the error says it less well.
REASONS = {
    "ControlNetXSAdapter": A_PART.format("`UNetControlNetXSModel`"),
    "CosmosControlNetModel": "its forward resizes with torchvision, which was not installed",
    "FluxMultiControlNetModel": A_LIST,
    "HunyuanDiT2DMultiControlNetModel": A_LIST,
    "MotionAdapter": A_PART.format("`UNetMotionModel`"),
    "MultiControlNetModel": A_LIST,
    "QwenImageMultiControlNetModel": A_LIST,
    "RFD4ProteinaTransformer": "a protein model: its annotations per residue do not follow from the configuration",
    "SD3MultiControlNetModel": A_LIST,
    "ZImageControlNetModel": "half of its modules are those of a transformer that is given to it when it is opened",
}


def denoiser_classes() -> dict[str, type[nn.Module]]:
    """Return every denoiser class that the installed diffusers exports, by name."""
    found = {}
    for name in dir(diffusers):
        value = None if name.startswith("_") or name.endswith(NO_MODELS) else exported(name)
        if not inspect.isclass(value) or not issubclass(value, nn.Module):
            continue
        arguments = inspect.signature(value.forward).parameters
        timed = any("timestep" in argument or "sigma" in argument or argument == "t" for argument in arguments)
        if timed or ROOMS.match(value.__module__):
            found[name] = value
    return found


def small_config(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments that make a class small and complete; the rest are its defaults."""
    config: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        value = parameter.default
        integers = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, int) for item in value)
        if value is None and name in OPEN:
            config[name] = OPEN[name]
        elif type(value) is int and DEPTH.fullmatch(name):
            config[name] = min(value, 1 if name == "layers_per_block" else 2)
        elif integers and LAYER_LISTS.fullmatch(name):
            config[name] = [0, 1]
    return config | CONFIGS.get(cls.__name__, {})


def trace(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the record of one class: its layers and how many the forward reaches, or the reason why not."""
    try:
        with torch.device("meta"):
            model = cls(**small_config(cls))
        graph = analyse(model).graph
    except (QuantDMError, TypeError) as error:  # a TypeError: its constructor takes more than a configuration
        reason = REASONS.get(cls.__name__) or _short(error)
        return {"traced": False, "list": reason == A_LIST, "reason": reason}
    ends = {end for edge in graph.edges for end in edge}
    layers = [node for node in graph.nodes if node.layer is not None]
    return {"traced": True, "list": False, "layers": len(layers), "reached": sum(node.id in ends for node in layers)}


def _short(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of class names: show these and write nothing")
    wanted = parser.parse_args().names
    records = {}
    for name, cls in denoiser_classes().items():
        if not wanted or any(part in name for part in wanted):
            records[name] = trace(cls)
            print(name, json.dumps(records[name]), flush=True)
    print(f"{sum(record['traced'] for record in records.values())} of {len(records)} classes are traced")
    if not wanted:
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        write_json(RESULTS, {"date": date, "versions": versions, "classes": records})


if __name__ == "__main__":
    main()
