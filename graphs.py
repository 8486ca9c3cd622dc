"""CUDA graphs: a fixed sequence of kernels, captured once and launched as one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["GraphedGradients"]

WARM_UP_CALLS = 3  # compilation, tuning and allocation happen here, which a capture cannot hold


class GraphedGradients:
    """A function that adds the gradients of a batch, as a CUDA graph.

    A network of many small kernels spends most of a step waiting for the host to launch them. A
    replay launches all of them at once. Random numbers still differ from call to call.

    Args:
        function: takes a batch, runs a forward and a backward pass, returns a tensor.
        parameters: whose gradients it adds to; they are cleared here and set by each call.
        example: a batch; all later ones have its shape, dtype and strides.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        parameters: Sequence[Parameter],
        example: Tensor,
    ):
        # A replay reads and writes the memory of all that the function refers to.
        self.function = function
        self.batch = example.clone()
        self.graph = torch.cuda.CUDAGraph()
        random_state = torch.cuda.get_rng_state(example.device)
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(self.batch)
                for parameter in parameters:
                    parameter.grad = None
        torch.cuda.current_stream(example.device).wait_stream(stream)
        torch.cuda.set_rng_state(random_state, example.device)
        # Threads that load data go on using the device meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = function(self.batch)
        # Captured without a gradient to add to, a replay overwrites these.
        self.gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def __call__(self, batch: Tensor) -> Tensor:
        """Set the gradients of this batch; the result is overwritten by the next call."""
        self.batch.copy_(batch)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.result
