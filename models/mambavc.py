"""MambaVC: Learned Visual Compression with Selective State Spaces (arXiv:2405.15413)."""

from itertools import pairwise

import torch
import torch.nn as nn

from layers import ConvChain, SwinAttentionBlock, VSSBlock
from layers.compressai import conv, deconv

from ._registry import register_model
from .base import SliceHyperprior
from .entropy import Bottleneck, Conditional
from .gains import Gains


@register_model("mambavc")
class MambaVC(SliceHyperprior):
    r"""Hyperprior codec with VSS blocks and a channel-wise autoregressive entropy model (Fig. 2).

    ::

        x ──► g_a ──► y ──┬──────────────► Q ──► y_hat ──► g_s ──► x_hat
                          ▼                ▲ mu, sigma, for one channel slice after another
                         h_a ──► z ──► EB ──► h_mean_s, h_scale_s ──► atten ──► cc

    y is at 1/16 of the picture's resolution, z at 1/64. With the default arguments the state dict
    has the keys and shapes of the published network (53.3 M parameters).

    Args:
        N: half the width of the transforms' stages.
        M: channels of y, a multiple of ``num_slices``.
        depths: blocks in the three stages of g_a (mirrored in g_s) and in the hyperprior.
        drop_path_rate: stochastic depth of the last block of a path.
        num_slices: channel slices of y, coded one after another.
        max_support_slices: decoded slices that a slice is predicted from, at most.
        Z: channels of z.
        context_width: width inside the attention and at the end of the slice transforms.
        transform_width: width of the first layer of the slice transforms.
        qualities: 0 for a single rate; or 2 or more, for gains (see `Gains`) learnt at so many
            qualities, which make every rate between them possible.
        lmbda_range: weights of the distortion at quality 0 and 100, where there are gains.
    """

    def __init__(
        self,
        N: int = 128,
        M: int = 320,
        depths: tuple[int, int, int, int] = (2, 2, 9, 2),
        drop_path_rate: float = 0.1,
        num_slices: int = 5,
        max_support_slices: int = 5,
        Z: int = 192,
        context_width: int = 128,
        transform_width: int = 224,
        qualities: int = 0,
        lmbda_range: tuple[float, float] = (0.0018, 0.12),  # about 0.11 to 1.35 bpp on Kodak
    ):
        super().__init__()
        if num_slices < 1 or M % num_slices:
            raise ValueError(f"M={M} is not a multiple of num_slices={num_slices}")
        self.config = {
            "N": N,
            "M": M,
            "depths": list(depths),
            "drop_path_rate": drop_path_rate,
            "num_slices": num_slices,
            "max_support_slices": max_support_slices,
            "Z": Z,
            "context_width": context_width,
            "transform_width": transform_width,
            "qualities": qualities,
            "lmbda_range": list(lmbda_range),
        }
        C = 2 * N
        L1, L2, L3, L4 = depths
        slice_width = M // num_slices
        ramp = torch.linspace(0, drop_path_rate, sum(depths)).tolist()

        def stages(*counts: int) -> list[list[nn.Module]]:
            rates = iter(ramp)
            return [[self.make_block(C, next(rates), i) for i in range(n)] for n in counts]

        stage1, stage2, stage3, hyper = stages(L1, L2, L3, L4)
        self.g_a = nn.Sequential(
            conv(3, C, kernel_size=5),
            *stage1,
            conv(C, C, kernel_size=3),
            *stage2,
            conv(C, C, kernel_size=3),
            *stage3,
            conv(C, M, kernel_size=3),
        )
        self.h_a = nn.Sequential(conv(M, C, kernel_size=3), *hyper, conv(C, Z, kernel_size=3))

        hyper, stage3, stage2, stage1 = stages(L4, L3, L2, L1)
        (scale_hyper,) = stages(L4)
        self.h_mean_s = nn.Sequential(
            deconv(Z, C, kernel_size=3), *hyper, deconv(C, M, kernel_size=3)
        )
        self.h_scale_s = nn.Sequential(
            deconv(Z, C, kernel_size=3), *scale_hyper, deconv(C, M, kernel_size=3)
        )
        self.g_s = nn.Sequential(
            deconv(M, C, kernel_size=3),
            *stage3,
            deconv(C, C, kernel_size=3),
            *stage2,
            deconv(C, C, kernel_size=3),
            *stage1,
            deconv(C, 3, kernel_size=5),
        )

        def attention(width: int) -> nn.Module:
            block = SwinAttentionBlock(width, context_width, head_dim=16, window_size=8)
            return nn.Sequential(block)

        def transform(width: int) -> nn.Module:
            return ConvChain(
                conv(width, transform_width, kernel_size=3, stride=1),
                nn.GELU(),
                conv(transform_width, context_width, kernel_size=3, stride=1),
                nn.GELU(),
                conv(context_width, slice_width, kernel_size=3, stride=1),
            )

        widths = [M + slice_width * min(i, max_support_slices) for i in range(num_slices)]
        self.atten_mean = nn.ModuleList(attention(width) for width in widths)
        self.atten_scale = nn.ModuleList(attention(width) for width in widths)
        self.cc_mean_transforms = nn.ModuleList(transform(width) for width in widths)
        self.cc_scale_transforms = nn.ModuleList(transform(width) for width in widths)
        self.lrp_transforms = nn.ModuleList(transform(width + slice_width) for width in widths)

        self.entropy_bottleneck = Bottleneck(Z)
        self.gaussian_conditional = Conditional(None)
        self.gains = Gains(qualities, M, Z, lmbda_range) if qualities else None
        self.to(memory_format=torch.channels_last)

    def make_block(self, dim: int, drop_path: float, index: int) -> nn.Module:
        """Block ``index`` of a stage: (batch, dim, height, width) to the same shape.

        The one thing a variant of the network overrides.
        """
        return VSSBlock(dim, drop_path)

    @staticmethod
    def config_from_state_dict(state_dict: dict[str, torch.Tensor]) -> dict:
        """Constructor arguments recovered from the shapes of a state dict."""

        def convolutions(transform: str) -> list[int]:
            """Positions of a transform's convolutions in its Sequential."""
            return sorted(
                int(key.split(".")[1])
                for key, value in state_dict.items()
                if key.startswith(f"{transform}.") and key.count(".") == 2 and value.ndim == 4
            )

        analysis, hyper = convolutions("g_a"), convolutions("h_a")
        M = state_dict[f"g_a.{analysis[-1]}.weight"].shape[0]
        num_slices = sum(key.endswith(".0.in_conv.weight") for key in state_dict) // 2
        last_width = state_dict[f"cc_mean_transforms.{num_slices - 1}.0.weight"].shape[1]
        transform_width = state_dict["cc_mean_transforms.0.0.weight"].shape[0]
        support = (last_width - M) // (M // num_slices)
        return {
            "N": state_dict["g_a.0.weight"].shape[0] // 2,
            "M": M,
            "depths": [end - start - 1 for start, end in (*pairwise(analysis), *pairwise(hyper))],
            "num_slices": num_slices,
            # A support that no slice exhausts leaves no trace in the shapes.
            "max_support_slices": support if support < num_slices - 1 else num_slices,
            "Z": state_dict[f"h_a.{hyper[-1]}.weight"].shape[0],
            "context_width": state_dict["cc_mean_transforms.0.2.weight"].shape[0],
            "transform_width": transform_width,
            "qualities": len(state_dict.get("gains.y_enc", ())),
        }


@register_model("mambavc-light")
def mambavc_light(**kwargs) -> MambaVC:
    """`MambaVC` at half the width, with one block in place of two at the highest resolution.

    13.9 M parameters, 22 % of the operations. Without stochastic depth.
    """
    preset = {
        "N": 64,
        "M": 160,
        "depths": (1, 2, 9, 2),
        "drop_path_rate": 0.0,
        "Z": 96,
        "context_width": 64,
        "transform_width": 112,
    }
    return MambaVC(**{**preset, **kwargs})
