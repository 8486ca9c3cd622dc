"""Mixed precision: a step casts all its weights in one launch."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class LowPrecision:
    """A network that computes with copies of its weights in autocast's dtype.

    Autocast casts each weight where it is used, and its gradient where that is made: two small
    kernels for each of hundreds of weights. Here all are cast together, once a step, with the same
    results.

    Args:
        network: any module, such as the wrapper that averages gradients; it is called in autocast.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        weights = [
            (name, parameter)
            for prefix, module in network.named_modules()
            for name, parameter in module.named_parameters(prefix, recurse=False)
            # Depthwise convolutions, norms and the scan take their parameters in float32.
            if (isinstance(module, _PRODUCTS) and getattr(module, "groups", 1) == 1)
            or name.endswith("x_proj_weight")
        ]
        self.names, self.weights = zip(*weights, strict=True)

    def __call__(self, *args):
        dtype = torch.get_autocast_dtype(self.weights[0].device.type)
        copies = _CastTogether.apply(dtype, *self.weights)
        # Branches of a graph read them in the backward pass, by when their memory must be theirs.
        self.kept = [copy.detach() for copy in copies]
        return functional_call(self.network, dict(zip(self.names, copies, strict=True)), args)


class _CastTogether(torch.autograd.Function):
    """Copies of tensors of one dtype in another; the gradients come back in the first."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_cast_together(tensors, dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = iter(_cast_together([g for g in gradients if g is not None], ctx.dtype))
        return None, *[None if g is None else next(present) for g in gradients]


def _cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
