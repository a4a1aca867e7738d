"""Inception-v3 as FID uses it: the network of 2015 with TensorFlow's pooling, from weights that people have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from quantdm.errors import QuantDMError

NUM_FEATURES, NUM_LOGITS, SIDE = 2048, 1008, 299

# One convolution: its name, output channels, kernel, stride, padding. Where it reads from: `_Block`.
_Conv = tuple[str, int, tuple[int, int], int, tuple[int, int]]


def _conv(name: str, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1, same: bool = True) -> _Conv:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return name, channels, (height, width), stride, (height // 2, width // 2) if same else (0, 0)


class _ConvNorm(nn.Module):
    """Convolution, batch normalisation with TensorFlow's epsilon, ReLU."""

    def __init__(self, channels: int, conv: _Conv) -> None:
        super().__init__()
        _, out, kernel, stride, padding = conv
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what follows the convolution."""
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches side by side (Szegedy et al. 2015, figures 5 to 7): chains of convolutions, and one pooled branch.

    The last entry of a chain may be a list: convolutions that all read the one before.
    """

    def __init__(self, channels: int, branches: Sequence[Sequence[_Conv | list[_Conv]]], pool: str) -> None:
        super().__init__()
        self.plan: list[list[str | list[str]]] = []
        self.pool = pool
        for branch in branches:
            width, names = channels, []
            for step in branch:
                for conv in step if isinstance(step, list) else [step]:
                    self.add_module(conv[0], _ConvNorm(width, conv))
                names.append([conv[0] for conv in step] if isinstance(step, list) else step[0])
                width = step[1] if isinstance(step, tuple) else width
            self.plan.append(names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the branches, one behind the other; the pooled one is the last."""
        found = [self._through(names, x) for names in self.plan if names != ["branch_pool"]]
        pooled = {
            # TensorFlow's mean leaves the padding out
            "mean": lambda: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
            "max": lambda: F.max_pool2d(x, 3, stride=1, padding=1),
            "half": lambda: F.max_pool2d(x, 3, stride=2),
        }[self.pool]()
        return torch.cat([*found, pooled if self.pool == "half" else self.get_submodule("branch_pool")(pooled)], 1)

    def _through(self, names: list[str | list[str]], x: torch.Tensor) -> torch.Tensor:
        for name in names:
            if isinstance(name, list):
                return torch.cat([self.get_submodule(each)(x) for each in name], 1)
            x = self.get_submodule(name)(x)
        return x


def _block_35(channels: int, pooled: int) -> _Block:
    three = [_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)]
    five = [_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)]
    return _Block(channels, [[_conv("branch1x1", 64)], five, three, [_conv("branch_pool", pooled)]], "mean")


def _block_17(inner: int) -> _Block:
    row, column = (1, 7), (7, 1)
    seven = [_conv("branch7x7_1", inner), _conv("branch7x7_2", inner, row), _conv("branch7x7_3", 192, column)]
    double = [
        _conv("branch7x7dbl_1", inner), _conv("branch7x7dbl_2", inner, column), _conv("branch7x7dbl_3", inner, row),
        _conv("branch7x7dbl_4", inner, column), _conv("branch7x7dbl_5", 192, row),
    ]  # fmt: skip
    return _Block(768, [[_conv("branch1x1", 192)], seven, double, [_conv("branch_pool", 192)]], "mean")


def _block_8(channels: int, pool: str) -> _Block:
    def crossed(name: str) -> list[_Conv]:
        return [_conv(f"{name}a", 384, (1, 3)), _conv(f"{name}b", 384, (3, 1))]

    three = [_conv("branch3x3_1", 384), crossed("branch3x3_2")]
    double = [_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3), crossed("branch3x3dbl_3")]
    return _Block(channels, [[_conv("branch1x1", 320)], three, double, [_conv("branch_pool", 192)]], pool)


class InceptionV3(nn.Module):
    """Inception-v3 with 1,008 outputs, as TensorFlow's graph of 2015-12-05 has it; input [N, 3, 299, 299] in [-1, 1].

    Names are those of the state dict that pytorch-fid and torch-fidelity hand out.
    """

    def __init__(self) -> None:
        super().__init__()
        stem = (
            ("Conv2d_1a_3x3", 3, _conv("", 32, 3, 2, same=False)), ("Conv2d_2a_3x3", 32, _conv("", 32, 3, same=False)),
            ("Conv2d_2b_3x3", 32, _conv("", 64, 3)), ("Conv2d_3b_1x1", 64, _conv("", 80)),
            ("Conv2d_4a_3x3", 80, _conv("", 192, 3, same=False)),
        )  # fmt: skip
        for name, channels, conv in stem:
            self.add_module(name, _ConvNorm(channels, conv))
        narrow = [_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3)]
        self.blocks = {
            "Mixed_5b": _block_35(192, 32), "Mixed_5c": _block_35(256, 64), "Mixed_5d": _block_35(288, 64),
            "Mixed_6a": _Block(
                288,
                [[_conv("branch3x3", 384, 3, 2, same=False)], [*narrow, _conv("branch3x3dbl_3", 96, 3, 2, same=False)]],
                "half",
            ),
            "Mixed_6b": _block_17(128), "Mixed_6c": _block_17(160), "Mixed_6d": _block_17(160),
            "Mixed_6e": _block_17(192),
            "Mixed_7a": _Block(
                768,
                [
                    [_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, 2, same=False)],
                    [
                        _conv("branch7x7x3_1", 192), _conv("branch7x7x3_2", 192, (1, 7)),
                        _conv("branch7x7x3_3", 192, (7, 1)), _conv("branch7x7x3_4", 192, 3, 2, same=False),
                    ],
                ],
                "half",
            ),
            "Mixed_7b": _block_8(1280, "mean"), "Mixed_7c": _block_8(2048, "max"),
        }  # fmt: skip
        for name, block in self.blocks.items():
            self.add_module(name, block)
        self.fc = nn.Linear(NUM_FEATURES, NUM_LOGITS)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the 2,048 features after the last pooling, [N, 2048]."""
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
            x = self.get_submodule(name)(x)
        x = F.max_pool2d(x, 3, stride=2)
        for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
            x = self.get_submodule(name)(x)
        x = F.max_pool2d(x, 3, stride=2)
        for block in self.blocks.values():
            x = block(x)
        return x.mean((2, 3))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 1008] of features, without the bias, as the Inception Score has it."""
        return features @ self.fc.weight.T


def load_inception(path: Path) -> InceptionV3:
    """Read the network from a state dict (.pth of pytorch-fid or torch-fidelity, or .safetensors).

    Raises:
        QuantDMError: the file is damaged, or holds other weights.
    """
    model = InceptionV3()
    known = model.state_dict()
    given = _state(path)
    given = {k: v for k, v in given.items() if not k.startswith("AuxLogits") and not k.endswith("num_batches_tracked")}
    wrong = next((k for k, v in given.items() if k in known and v.shape != known[k].shape), None)
    lacks = [k for k in known if k not in given and not k.endswith("num_batches_tracked")]
    if wrong or lacks or set(given) - set(known):
        odd = (lacks or sorted(set(given) - set(known)) or [wrong])[0]
        what = f"{wrong} is {tuple(given[wrong].shape)}" if wrong else str(odd)
        raise QuantDMError(
            f"{path}: holds no Inception weights of 2015-12-05 with 1,008 outputs ({what}); expected "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid or weights-inception-2015-12-05-6726825d.pth of "
            "torch-fidelity"
        )
    model.load_state_dict(given, strict=False)
    return model.eval().requires_grad_(False)


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    from quantdm.files import load_tensors

    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers raise
        raise QuantDMError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]:.120})") from None
    if not isinstance(found, Mapping) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise QuantDMError(f"{path}: is no state dict, expected a mapping of names to tensors")
    return found
