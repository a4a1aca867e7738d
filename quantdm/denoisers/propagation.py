"""How much of an error in each layer's weight arrives at the output of a denoiser: all layers from one backward pass.

A small error E of one weight changes the output by J E, J the derivative there. |J E|^2 is the mean of (s . J E)^2 over
random signs s (Hutchinson, 1990), and s . J E is the sum over the layer's outputs of g * (E x): x is what the layer was
called with, g the gradient of s . output behind it. So one forward and one backward pass serve every layer, and each
option of a layer costs one more product with its inputs, where measuring it costs a forward pass of the whole network.
The samples of a batch have signs of their own and are squared apart: each is a draw.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantdm.denoisers.calls import Call, first_tensor, layer_input
from quantdm.denoisers.weights import CONVOLUTIONS

WeightErrors = Callable[[str], Iterable[Tensor]]
PLAIN = {kind.forward for kind in (nn.Linear, *CONVOLUTIONS)}  # what their product is known of
SAME = 1e-3  # the relative error up to which an output counts as the recorded one


def propagated_errors(
    denoiser: nn.Module, call: Call, layer_names: Sequence[str], errors: WeightErrors, *, seed: int
) -> dict[str, list[float]]:
    """Estimate, per layer and error of its weight, |output - reference|^2 / |reference|^2 where it alone has the error.

    To first order in the error: where that is large the output changes less, or more. The standard deviation of the
    logarithm is at least sqrt(2 / d), d the samples of all calls and seeds that estimates are averaged over.

    Args:
        denoiser: in full precision; it is left as it was.
        call: of this denoiser, recorded; its output is the reference.
        layer_names: Linear or Conv layers.
        errors: returns the errors of a layer's weight, each of the weight's shape. It is asked layer by layer, as the
            backward pass comes to them, more than once where a layer is called more than once.
        seed: of the signs.

    Returns:
        Only layers that the call runs and gradients reach: not those whose weights are read by others, nor those with
        a forward pass of their own kind.

    Raises:
        RuntimeError: the network has no backward pass, there is no memory for it, or its output is another with it.
    """
    samples, reference = len(call.output), call.output
    signs = torch.randint(0, 2, reference.shape, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)
    norm = reference.double().norm().item()
    parts: dict[str, list[Tensor]] = defaultdict(list)  # one [samples or 1, errors] for every call of a layer

    def told(name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        columns = [_by_sample(_product(module, x, error), gradient, samples) for error in errors(name)]
        parts[name].append(torch.stack(columns, dim=1))

    with _checkpointed(denoiser), _tapped(denoiser, layer_names, told), torch.enable_grad():
        output = first_tensor(denoiser(*call.args, **call.kwargs))
        if not (output.detach().double() - reference.double()).norm().item() <= SAME**0.5 * norm:
            raise RuntimeError("its output is another where gradients are wanted")
        if norm and output.requires_grad:
            output.backward(signs.to(output))
    return {name: _mean_square(found, samples, norm) for name, found in parts.items()}


class _Tap(torch.autograd.Function):
    """Hand on a layer's output; on the way back, tell its input and the gradient behind it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, told: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.told = told
        ctx.save_for_backward(x)
        return output.clone()  # not a view: some networks go on in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        ctx.told(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None, None, None


@contextmanager
def _tapped(
    denoiser: nn.Module, layer_names: Sequence[str], told: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Let every layer's output pass a tap while the context is open; no parameter asks for gradients meanwhile."""
    anchor = torch.zeros((), requires_grad=True)  # so that there is a way back where nothing before has one
    asking = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]

    def hook(name: str, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        return _Tap.apply(output, anchor, layer_input(name, args, kwargs).detach(), partial(told, name, module))  # pyright: ignore

    with ExitStack() as stack:
        for parameter in asking:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for name in layer_names:
            if type(denoiser.get_submodule(name)).forward not in PLAIN:
                continue
            handle = denoiser.get_submodule(name).register_forward_hook(partial(hook, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _checkpointed(denoiser: Any) -> Iterator[None]:
    """Let a network that can do so keep what its blocks are called with, and compute the rest anew (Chen, 2016)."""
    if not getattr(denoiser, "_supports_gradient_checkpointing", False) or denoiser.is_gradient_checkpointing:
        yield
        return
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


def _product(module: nn.Module, x: Tensor, error: Tensor) -> Tensor:
    """Return what a layer would make of its input, had it this weight and no bias."""
    error = error.to(x)
    if isinstance(module, CONVOLUTIONS):
        return module._conv_forward(x, error, None)
    return nn.functional.linear(x, error)


def _by_sample(product: Tensor, gradient: Tensor, samples: int) -> Tensor:
    """Return the sum of product * gradient of every sample, or of all [1] where the first dimension is not theirs.

    Frames and places that networks move to the first dimension are taken to follow their sample, as in those of
    diffusers. What samples share in truth would be told too small: by half, of two.
    """
    whole = product.float() * gradient.float()
    return whole.reshape(samples if len(whole) % samples == 0 else 1, -1).sum(dim=1)


def _mean_square(parts: Sequence[Tensor], samples: int, norm: float) -> list[float]:
    """Return the sum over samples of the squares of what all calls of a layer add up to, relative to the output's."""
    apart = all(len(part) == samples for part in parts)
    whole = sum(part if apart else part.sum(dim=0, keepdim=True) for part in parts)
    assert isinstance(whole, Tensor)
    return (whole.double().square().sum(dim=0) / norm**2).tolist()
