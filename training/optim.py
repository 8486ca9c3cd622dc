"""Optimisers, learning-rate schedules and the split of parameters between them."""

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Adam, Optimizer

from kernels.graphs import side_by_side
from layers.ss2d import SS2D, is_fixed
from utils import UsageError

logger = logging.getLogger("mambavc")

# Parameters of the scan that are stacks of matrices, one for each direction.
_MATRIX_STACKS = ("x_proj_weight", "dt_projs_weight")

# Quintic whose iterates push all singular values towards 1, tuned for speed at zero rather than
# for convergence: five steps bring them to about [0.7, 1.2] (Jordan et al., "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Of an update in a CUDA graph: most of its products are too small for a GPU.
BRANCHES = 4


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters of a codec that are trained by the optimiser that suits them.

    Returns:
        ``matrices``: weights of linear layers, kernels of convolutions that mix channels, the
        scan's projections. ``aux``: the entropy bottleneck's quantiles, which the auxiliary loss
        alone trains. ``rest``: biases, norms, depthwise kernels, A, D, position biases, the
        bottleneck's densities.
    """
    kernels = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups == 1)
    }
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "rest": [], "aux": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".quantiles"):
            groups["aux"].append(parameter)
        elif id(parameter) in kernels or name.endswith(_MATRIX_STACKS):
            groups["matrices"].append(parameter)
        else:
            groups["rest"].append(parameter)
    return groups


def fix_A(model: nn.Module, reset: bool = False) -> None:
    """Leave the A of all scans at -(1..dstate), where training starts, which a faster kernel takes.

    Args:
        reset: set A of other values back to these, and say so.

    Raises:
        UsageError: A has other values.
    """
    moved = 0
    for name, module in model.named_modules():
        if isinstance(module, SS2D):
            if not is_fixed(module.A_logs):
                if not reset:
                    raise UsageError(
                        f"--fixed-A needs A as training starts with it, but {name}.A_logs has "
                        "other values; leave out --fixed-A, or start at step 0"
                    )
                module.reset_A()
                moved += 1
            module.A_logs.requires_grad_(False)
    if moved:
        logger.warning("--fixed-A: A of %d scans was set back to its first values", moved)


def make_optimizers(
    model: nn.Module, name: str, lr: float, aux_lr: float
) -> tuple[dict[str, Optimizer], Optimizer]:
    """Build the optimisers of the network and the one of the auxiliary loss.

    Args:
        model: on the device it is trained on.
        name: ``adam`` for everything, or ``muon`` for matrices and Adam for the rest.
        lr: learning rate of the network's optimisers.
        aux_lr: learning rate of the quantiles.
    """
    groups = split_parameters(model)
    fused = groups["aux"][0].is_cuda
    if name == "muon":
        net: dict[str, Optimizer] = {
            "muon": Muon(groups["matrices"], lr),
            "adam": Adam(groups["rest"], lr, fused=fused),
        }
    else:
        net = {"adam": Adam(groups["matrices"] + groups["rest"], lr, fused=fused)}
    return net, Adam(groups["aux"], aux_lr, fused=fused)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values of matrices close to 1 by Newton-Schulz iteration.

    Args:
        matrices: (batch, rows, columns).
        steps: of the iteration.

    Returns:
        The same shape, in bfloat16 on a GPU and in float32 elsewhere. Zero stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    transpose = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if transpose else matrices
    X = X.to(torch.bfloat16 if X.is_cuda else torch.float32)
    for step in range(steps):
        A = X @ X.mT
        if step == 0:
            # X's norm is the root of the trace; it divides A and B, which are smaller than X.
            squares = A.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)[:, None, None]
            squares.clamp_(min=1e-14)
            A.div_(squares)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        # With a X as a part of the product, no copy of X is made to add it to.
        B.diagonal(dim1=-2, dim2=-1).add_(a)
        if step == 0:
            B.mul_(squares.rsqrt_())
        X = B @ X
    return X.mT if transpose else X


def _as_matrices(x: Tensor) -> Tensor:
    """View a weight, or what has its shape, as (count, rows, columns).

    Kernels become output (of transposed convolutions: input) channels by the rest, with the
    columns in the order in which a channels-last kernel lies in memory.
    """
    if x.ndim == 4:
        return x.permute(0, 2, 3, 1).flatten(1)[None]
    return x if x.ndim == 3 else x[None]


def _as_weight(matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `_as_matrices`."""
    if len(shape) == 4:
        rows, columns, height, width = shape
        return matrices.view(rows, height, width, columns).permute(0, 3, 1, 2)
    return matrices.view(shape)


def _padded_size(rows: int, columns: int) -> tuple[int, int]:
    """Sides of matrices that are orthogonalised together with one of this shape, the smaller first.

    A network has tens of shapes, mostly of few matrices: too little work at a time for a GPU.
    """
    return tuple(sorted(1 << (side - 1).bit_length() for side in (rows, columns)))


def _work(item: tuple) -> int:
    """Multiplications, in some unit, of what `Muon` orthogonalises in one batch."""
    (rows, columns), shapes = item
    return rows**2 * columns * sum(len(entries) for entries in shapes)


class Muon(Optimizer):
    """Orthogonalised Nesterov momentum for weight matrices and kernels (Jordan et al., 2024).

    Each update has all its singular values near 1 and is scaled by 0.2 sqrt(larger side), which
    gives it the size of one of Adam's, so that Adam's learning rates carry over (Liu et al.,
    arXiv:2502.16982).

    Args:
        params: weights of 2 (matrix), 3 (stack of matrices) or 4 dimensions (kernel).
        lr: learning rate; a group's may also be a tensor on the weights' device.
        momentum: of the running mean of gradients.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers = []
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(self.state[p]["momentum_buffer"])
            if not params:
                continue
            grads = [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            momenta = torch._foreach_lerp(grads, buffers, group["momentum"])

            by_shape = defaultdict(list)
            for p, momentum in zip(params, momenta, strict=True):
                matrices = _as_matrices(momentum)
                by_shape[matrices.shape[1:]].append((p, matrices))
            by_size = defaultdict(list)
            for shape, entries in by_shape.items():
                by_size[_padded_size(*shape)].append(entries)
            # A tensor without dimensions would be rounded to the precision of the updates.
            rate = params[0].new_empty(1).fill_(group["lr"])

            # The longest first, so that branches come to about as much work.
            sizes = sorted(by_size.items(), key=_work, reverse=True)
            shares = [sizes[i::BRANCHES] for i in range(BRANCHES)]
            branches = [functools.partial(self._updates, share, rate) for share in shares]
            updates = [update for found in side_by_side(branches, [rate]) for update in found]
            weights = [
                weight for share in shares for _, shapes in share for entries in shapes
                for weight, _ in entries
            ]  # fmt: skip
            torch._foreach_sub_(weights, updates)

    def _updates(self, sizes: Sequence[tuple], rate: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            update for size, shapes in sizes for update in self._updates_of(size, shapes, rate)
        )

    def _updates_of(
        self,
        size: tuple[int, int],
        shapes: Sequence[Sequence[tuple[Tensor, Tensor]]],
        rate: Tensor,
    ) -> list[Tensor]:
        """Orthogonalise matrices of similar shapes in one batch: what weights are to lose.

        Args:
            size: that they are padded to; zeros stay zeros and change nothing.
            shapes: lists of weights and their momenta as (count, rows, columns), of one shape each.
            rate: learning rate, (1,).
        """
        stacks = [torch.cat([matrices for _, matrices in entries]) for entries in shapes]
        stacks = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
        counts = [len(stack) for stack in stacks]
        dtype = torch.bfloat16 if rate.is_cuda else rate.dtype
        padded = rate.new_zeros((sum(counts), *size), dtype=dtype)
        for part, stack in zip(padded.split(counts), stacks, strict=True):
            part[:, : stack.shape[1], : stack.shape[2]] = stack
        parts = orthogonalise(padded).split(counts)
        found = []
        for part, stack, entries in zip(parts, stacks, shapes, strict=True):
            rows, columns = entries[0][1].shape[1:]
            scale = rate * (0.2 * math.sqrt(max(rows, columns)))
            updates = part[:, : stack.shape[1], : stack.shape[2]] * scale
            updates = (updates.mT if rows > columns else updates).contiguous()
            updates = updates.split([len(matrices) for _, matrices in entries])
            weights = [weight for weight, _ in entries]
            found += [_as_weight(u, w.shape) for u, w in zip(updates, weights, strict=True)]
        return found


def warmup_factor(step: int, warmup_steps: int) -> float:
    """What the learning rate of a step, counted from the warm-up's first, is multiplied by."""
    return min((step + 1) / (warmup_steps + 1), 1.0)


def first_cooldown_step(total_steps: int, cooldown: float) -> int:
    """Where a cool-down of so many steps begins, or of such a fraction of the run below 1."""
    steps = cooldown if cooldown >= 1 else cooldown * total_steps
    return max(total_steps - round(steps), 0)


def lr_factor(
    step: int,
    schedule: str,
    total_steps: int,
    milestones: Sequence[float] = (),
    cooldown_start: float = math.inf,
    cooldown_shape: str = "1-sqrt",
) -> float:
    """Learning rate of a step as a fraction of the full one, warm-up aside.

    Args:
        step: from 0.
        schedule: ``cosine`` falls to zero at ``total_steps``; ``multistep`` falls tenfold at
            each milestone; ``wsd`` is constant and falls to zero between ``cooldown_start`` and
            ``total_steps`` (warm-up, stable, decay; Hu et al., arXiv:2404.06395).
        total_steps: length of the run.
        milestones: steps at which ``multistep`` falls.
        cooldown_start: step at which the fall of ``wsd`` begins.
        cooldown_shape: ``linear``; or ``1-sqrt``, the better one in Hägele et al.
            (arXiv:2405.18392).
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))
    if schedule == "wsd":
        if step < cooldown_start:
            return 1.0
        done = min((step - cooldown_start) / max(total_steps - cooldown_start, 1), 1.0)
        return 1 - (done if cooldown_shape == "linear" else math.sqrt(done))
    return 0.1 ** sum(step >= milestone for milestone in milestones)
