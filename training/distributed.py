"""The processes that train one network together."""

import contextlib
import inspect
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import utils
from utils import UsageError


class Processes:
    """This process among those that torchrun started, or the only one.

    Args:
        cuda: each process has a GPU of its own and they talk through NCCL; else through gloo.

    Attributes:
        rank, world_size: place among all processes, and how many they are; both: ``place``.
        local_world_size: how many of them share this machine.
        device: where this process computes.

    Raises:
        UsageError: there is no GPU for this process.
    """

    def __init__(self, cuda: bool):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        self.place = (self.rank, self.world_size)
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.device = utils.select_device(cuda)
        if cuda:
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                raise UsageError(
                    f"process {local_rank} of this machine has no GPU, {gpus} are visible; "
                    f"use --nproc_per_node={gpus}"
                )
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module, average: bool = True) -> nn.Module:
        """The model with the first process's weights, and gradients averaged over all processes.

        Args:
            average: by hooks in each backward pass; without them `average` has to be called.
        """
        if self.world_size == 1:
            return model
        if not average:
            self.share([p.detach() for p in model.parameters()])
            return model
        # The buffers are constants. PyTorch 2.14 gave the argument a new name.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync: False})

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)
            increment_version(tensors)  # which a broadcast does not

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size

    def sum(self, values: Tensor) -> list[float]:
        """Sum of a vector over all processes."""
        values = values.double()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, value: list) -> list:
        """The lists of all processes, one after another."""
        if self.world_size == 1:
            return value
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return [item for part in values for item in part]

    def global_draws(self) -> contextlib.AbstractContextManager:
        """A context in which the network draws its noise; see `GlobalDraws`."""
        if self.world_size == 1:
            return contextlib.nullcontext()
        return GlobalDraws(self.rank, self.world_size)


class GlobalDraws(TorchFunctionMode):
    """Random numbers of a batch that is spread over processes.

    Every process draws for the whole global batch, from the same random state, and keeps its own
    part. So quantisation noise and stochastic depth are those of one process with the full batch,
    processes keep the same random state, and a checkpoint of one of them resumes all.
    """

    def __init__(self, rank: int, world_size: int):
        super().__init__()
        self.rank = rank
        self.world_size = world_size

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (Tensor.uniform_, Tensor.bernoulli_):
            return func(*args, **kwargs)
        own, *parameters = args
        # CompressAI's bottleneck draws for (channels, 1, batch * height * width), all others for
        # (batch, ...).
        dim = 2 if own.ndim == 3 else 0
        whole = func(torch.cat([own] * self.world_size, dim=dim), *parameters, **kwargs)
        return own.copy_(whole.narrow(dim, self.rank * own.shape[dim], own.shape[dim]))
