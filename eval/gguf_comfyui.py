"""Open a GGUF file with ComfyUI and ComfyUI-GGUF; run by eval/gguf_readers.py with ComfyUI's own interpreter.

    python eval/gguf_comfyui.py CHECKOUT SHAPES.json
    python eval/gguf_comfyui.py CHECKOUT FILE.gguf INPUTS.safetensors TIMESTEP

The first compares names and shapes (model -> tensor -> shape) with those of ComfyUI's models. The second detects
the model and loads it as the node "Unet Loader (GGUF/Advanced)" does, decoding in float32; writes the answer
beside the inputs (`.comfyui`) and prints, as one line of JSON, what ComfyUI made of the tensors.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import logging
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def extension(checkout: Path) -> Path:
    """Make the folder of ComfyUI-GGUF importable, whose name no `import` can say; its nodes are not needed."""
    folder = checkout / "custom_nodes" / "ComfyUI-GGUF"
    spec = importlib.machinery.ModuleSpec("comfyui_gguf", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
    return folder


@torch.no_grad()
def answer(model: torch.nn.Module, given: dict[str, torch.Tensor], timestep: float) -> torch.Tensor:
    """Call ComfyUI's model; FLUX takes images there and tokens in diffusers."""
    time, context, pooled = torch.tensor([timestep]), given["encoder_hidden_states"], given.get("pooled_projections")
    if type(model).__name__ != "Flux":
        image = given["sample"] if "sample" in given else given["hidden_states"]
        return model(image, time, context=context, y=pooled)
    side = int(given["hidden_states"].shape[1] ** 0.5)
    tokens = given["hidden_states"].view(1, side, side, 16, 2, 2)
    image = tokens.permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 2 * side, 2 * side)
    made = model(image, time, context, y=pooled, guidance=torch.tensor([3.5]))
    return made.view(1, 16, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, side * side, 64)


def opened(checkout: Path, file: Path, inputs: Path, timestep: float) -> dict[str, Any]:
    """Load a file as the node does; return what ComfyUI made of its tensors, and write what its model answers."""
    folder = extension(checkout)
    loader, ops = importlib.import_module("comfyui_gguf.loader"), importlib.import_module("comfyui_gguf.ops")
    kept = Kept()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(kept)
    operations = ops.GGMLOps()
    operations.Linear.dequant_dtype = torch.float32
    options: dict[str, Any] = {"custom_operations": operations, "dtype": torch.float32}
    sd = importlib.import_module("comfy.sd")
    patcher = sd.load_diffusion_model_state_dict(loader.gguf_sd_loader(str(file)), model_options=options)
    model = patcher.model.diffusion_model
    save_file({"answer": answer(model, load_file(inputs), timestep).contiguous()}, inputs.with_suffix(".comfyui"))
    return {
        "version": importlib.import_module("comfyui_version").__version__,
        "ComfyUI-GGUF": tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"],
        "model": type(patcher.model.model_config).__name__,
        "types": next(line.partition("qtypes: ")[2] for line in kept.lines if "qtypes: " in line),
        "missing": [line for line in kept.lines if line.startswith("unet missing")],
        "unexpected": [line for line in kept.lines if line.startswith(("unet unexpected", "left over"))],
    }


def compared(file: Path) -> dict[str, Any]:
    """Detect models by names and shapes, and compare those with the tensors of ComfyUI's models."""
    detection, found = importlib.import_module("comfy.model_detection"), {}
    for name, shapes in json.loads(file.read_text()).items():
        state = {key: torch.zeros(shape, device="meta" if len(shape) > 1 else "cpu") for key, shape in shapes.items()}
        config = detection.model_config_from_unet(state, "")
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model(state, "", device="meta").diffusion_model
        theirs = {key: list(value.shape) for key, value in model.state_dict().items()}
        odd = sorted(key for key in theirs.keys() | shapes.keys() if theirs.get(key) != shapes.get(key))
        found[name] = {"model": type(config).__name__, "tensors": len(shapes), "differing": odd}
    return found


def main() -> None:
    checkout, file, *rest = sys.argv[1:]
    sys.path.insert(0, checkout)
    sys.argv = [sys.argv[0], "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    if rest:
        print(json.dumps(opened(Path(checkout), Path(file), Path(rest[0]), float(rest[1]))))
    else:
        print(json.dumps(compared(Path(file))))


if __name__ == "__main__":
    main()
