"""The public scan: its contract, the checks of its arguments, its precision."""

import torch
from torch import Tensor

from kernels import backends, scan_operator, scan_reference
from kernels.project import fork_project, project
from kernels.scan_reference import ScanInputs


def selective_scan_2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    fixed_A: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scan a feature map along four orders of its pixels and sum the results (SS2D).

    The orders are row-major, column-major, and both reversed. In each, with delta's low-rank part
    r, B and C projected from x at every pixel and A = -exp(A_logs) (arXiv:2312.00752, eq. 2;
    arXiv:2401.10166, section 4)::

        delta_t = softplus(dt_projs_weight r_t + dt_projs_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = C_t . h_t + D x_t

    Args:
        x: (batch, height, width, dim); float32, float64, bfloat16 or float16, any strides.
        x_proj_weight: (4, dt_rank + 2 * dstate, dim), rows in the order r, B, C.
        dt_projs_weight: (4, dim, dt_rank).
        dt_projs_bias: (4, dim).
        A_logs: (4 * dim, dstate).
        Ds: (4 * dim,).
        fixed_A: a promise that A_logs is log(1..dstate) in every channel, to the rounding of
            float32. It gets no gradient then, and kernels that know of the promise take powers of
            one exponential for all states. Float64 maps are scanned by A_logs as it is.
        backend: ``auto``, ``triton``, ``cpu``, ``mamba_ssm`` or ``reference``. ``auto`` is what
            `kernels.use_backend` or the environment says; without either the compiled backend
            of x's device, or the reference where that is missing.

    Returns:
        (batch, height, width, dim) in x's dtype. States, delta and sums are float32, for float64
        maps float64; parameters are cast to that. Differentiable once in all tensors, but for
        A_logs where it is fixed. Gradients of 16-bit maps are then made, with ``triton``, from
        delta in float16, and its gradient in bfloat16.

    Raises:
        ValueError: a shape or dtype is not as above, or there is no backend of that name.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> block = layers.SS2D(96)
        >>> selective_scan_2d(torch.rand(1, 8, 8, 192), *block.scan_parameters()).shape
        torch.Size([1, 8, 8, 192])
    """
    _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    backend = backends.choose_scan(backend, x.device.type)
    # One product for all directions, in image order: it commutes with the orders of the scan.
    weight = x_proj_weight.flatten(0, 1).to(x.dtype)
    # The gradient by x of its own operator is a new tensor; those of other backends need not be.
    x, x_dbl = fork_project(x, weight) if backend == "triton" else (x, project(x, weight))
    x_dbl = x_dbl.to(x.dtype).unflatten(-1, x_proj_weight.shape[:2])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if fixed_A:
        A_logs = A_logs.detach()
        fixed_A = dtype == torch.float32  # rounded logarithms are not those of float64
    parameters = (dt_projs_weight, dt_projs_bias, A_logs, Ds)
    inputs = ScanInputs(
        x.contiguous(), x_dbl.contiguous(), *(p.to(dtype).contiguous() for p in parameters)
    )
    if backend == "reference":
        return scan_reference.scan_2d(inputs)
    if backend == "mamba_ssm":
        from kernels import scan_mamba_ssm

        return scan_mamba_ssm.scan_2d(inputs)
    if fixed_A and backend == "triton" and torch.is_grad_enabled():
        y, _ = scan_operator.scan_2d_and_states(*inputs)
        return y
    return scan_operator.scan_2d(*inputs, fixed_A)  # triton or cpu, whichever x's device has


def _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"x must be (batch, height, width, dim) and not empty, got {tuple(x.shape)}"
        )
    backends.check_dtype("x", x)
    if dt_projs_weight.ndim != 3 or A_logs.ndim != 2:
        raise ValueError(
            "dt_projs_weight must be (4, dim, dt_rank) and A_logs (4 * dim, dstate), got "
            f"{tuple(dt_projs_weight.shape)} and {tuple(A_logs.shape)}"
        )
    dim, dt_rank, dstate = x.shape[3], dt_projs_weight.shape[2], A_logs.shape[1]
    if dt_rank == 0 or dstate == 0:
        raise ValueError(f"dt_rank and dstate must be at least 1, got {dt_rank} and {dstate}")
    for name, parameter, shape in (
        ("x_proj_weight", x_proj_weight, (4, dt_rank + 2 * dstate, dim)),
        ("dt_projs_weight", dt_projs_weight, (4, dim, dt_rank)),
        ("dt_projs_bias", dt_projs_bias, (4, dim)),
        ("A_logs", A_logs, (4 * dim, dstate)),
        ("Ds", Ds, (4 * dim,)),
    ):
        if parameter.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for x {tuple(x.shape)}, dt_rank {dt_rank} and dstate "
                f"{dstate}, got {tuple(parameter.shape)}"
            )
