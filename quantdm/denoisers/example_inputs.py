"""Example inputs of a denoiser on the meta device, by argument name: data, not one function per model."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantdm.denoisers.weights import weight_specs
from quantdm.errors import QuantDMError

BATCH = 2  # not 1: a batch of one would be broadcast where the model means something else
TOKENS = 16  # text tokens, and image tokens of denoisers that take packed latents (a 4 x 4 grid)
SIZE = 64  # latent height and width where the configuration states none
FRAMES = 4
# The remedy of every error of tracing; all doors that it names take them.
GIVE_INPUTS = (
    "give the keyword arguments of one call of the denoiser (values do not matter): example_inputs={...} of "
    "list_layers, trace_graph, apply_recipe, search and QuantDMConfig, --example-inputs FILE on the command line, or "
    "what quantdm.capture_inputs(pipe, call) returns"
)


@dataclass(frozen=True)
class _Model:
    """What the rules may look at: configuration values, forward's argument names, weight shapes."""

    config: Mapping[str, Any]
    arguments: frozenset[str]
    input_kind: str | None  # kind of the first layer that reads `in_channels`

    def get(self, *names: str) -> Any:
        """Return the first configuration value that is there and not None (a list counts by its first entry)."""
        for name in names:
            value = self.config.get(name)
            if value is not None:
                return value[0] if isinstance(value, (list, tuple)) and value else value
        return None


def infer_inputs(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for `model.forward` with tensors on the meta device (batch of two).

    Raises:
        QuantDMError: a required argument is of a name or shape that cannot be told from the configuration.
    """
    parameters = inspect.signature(model.forward).parameters
    channels = config.get("in_channels")
    readers = (s.kind for s in weight_specs(model) if len(s.shape) > 1 and s.shape[1] == channels)
    known = _Model(config, frozenset(parameters), next(readers, None))
    inputs, missing = {}, []
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        rule = RULES.get(name) or (REQUIRED_RULES.get(name) if required else None)
        value = rule(known) if rule is not None else None
        if value is not None:
            inputs[name] = value
        elif required:
            missing.append(name)
    if missing:
        raise QuantDMError(
            f"{type(model).__name__}: cannot infer example inputs for {', '.join(missing)}; expected arguments whose "
            f"shapes follow from the configuration; {GIVE_INPUTS}"
        )
    return inputs


def to_meta(value: Any) -> Any:
    """Return given example inputs with every tensor on the meta device, floating point ones in the default dtype."""
    if isinstance(value, Tensor):
        return value.to("meta", torch.get_default_dtype()) if value.is_floating_point() else value.to("meta")
    if isinstance(value, Mapping):
        return {key: to_meta(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(item) for item in value)
    return value


def _float(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _long(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.long)


def _size(m: _Model) -> tuple[int, int]:
    size = m.config.get("sample_size")
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return (int(size), int(size)) if size is not None else (SIZE, SIZE)


def _latents(m: _Model) -> Tensor | None:
    channels = m.get("in_channels")
    if channels is None:
        return None
    height, width = _size(m)
    if "img_ids" in m.arguments or m.input_kind == "linear":
        return _float(BATCH, TOKENS, channels)
    if m.input_kind == "conv1d":
        return _float(BATCH, channels, width)
    if m.input_kind == "conv3d":
        return _float(BATCH, channels, FRAMES, height, width)
    return _float(BATCH, channels, height, width)


def _text(m: _Model) -> Tensor | None:
    width = m.get("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim")
    width = width or m.get("encoder_hid_dim", "cross_attention_dim")
    return None if width is None else _float(BATCH, m.get("text_len") or TOKENS, width)


def _class_labels(m: _Model) -> Tensor | None:
    if m.get("class_embed_type") in ("projection", "simple_projection"):
        return _float(BATCH, m.get("projection_class_embeddings_input_dim"))
    if m.get("class_embed_type") == "timestep":
        return _float(BATCH)
    return _long(BATCH) if m.get("num_class_embeds", "num_embeds_ada_norm") is not None else None


def _added_conditions(m: _Model) -> dict[str, Tensor]:
    conditions = {}
    if m.get("addition_embed_type") == "text_time":
        pooled = m.get("projection_class_embeddings_input_dim") - 6 * m.get("addition_time_embed_dim")
        conditions = {"text_embeds": _float(BATCH, pooled), "time_ids": _float(BATCH, 6)}
    if "use_additional_conditions" in m.config:
        conditions |= {"resolution": _float(BATCH, 2), "aspect_ratio": _float(BATCH, 1)}
    return conditions


def _rotary(m: _Model) -> tuple[Tensor, Tensor] | None:
    if "use_style_cond_and_image_meta_size" not in m.config:  # the other denoisers make their own
        return None
    height, width = _size(m)
    patch = m.get("patch_size")
    shape = ((height // patch) * (width // patch), m.get("attention_head_dim"))
    return _float(*shape), _float(*shape)


def _when(key: str, make: Callable[[_Model], Any]) -> Callable[[_Model], Any]:
    """Apply `make` only where the configuration switches `key` on."""
    return lambda m: make(m) if m.get(key) else None


RULES: dict[str, Callable[[_Model], Any]] = {
    "sample": _latents,
    "hidden_states": _latents,
    "timestep": lambda m: _float(BATCH),
    "timesteps": lambda m: _float(BATCH),
    "encoder_hidden_states": _text,
    "class_labels": _class_labels,
    "added_cond_kwargs": _added_conditions,
    "timestep_cond": _when("time_cond_proj_dim", lambda m: _float(BATCH, m.get("time_cond_proj_dim"))),
    "pooled_projections": _when("pooled_projection_dim", lambda m: _float(BATCH, m.get("pooled_projection_dim"))),
    "guidance": lambda m: _float(BATCH) if m.get("guidance_embeds", "guidance_embed") else None,
    "img_ids": lambda m: _float(TOKENS, 3),
    "txt_ids": lambda m: _float(TOKENS, 3),
    "text_embedding_mask": _when("text_len", lambda m: _long(BATCH, m.get("text_len"))),
    "text_embedding_mask_t5": _when("text_len_t5", lambda m: _long(BATCH, m.get("text_len_t5"))),
    "encoder_hidden_states_t5": _when(
        "text_len_t5", lambda m: _float(BATCH, m.get("text_len_t5"), m.get("cross_attention_dim_t5"))
    ),
    "image_meta_size": _when("use_style_cond_and_image_meta_size", lambda m: _float(BATCH, 6)),
    "style": _when("use_style_cond_and_image_meta_size", lambda m: _long(BATCH)),
    "image_rotary_emb": _rotary,
    "return_dict": lambda m: False,
}
# Optional in most denoisers, where they only mask: given only to those whose forward insists.
REQUIRED_RULES: dict[str, Callable[[_Model], Any]] = {
    "encoder_attention_mask": lambda m: _long(BATCH, TOKENS),
    "attention_mask": lambda m: _long(BATCH, TOKENS),
    "original_size": lambda m: _float(BATCH, 2),
    "target_size": lambda m: _float(BATCH, 2),
    "crop_coords": lambda m: _float(BATCH, 2),
}
