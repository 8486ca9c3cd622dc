"""CUDA graphs: a fixed sequence of kernels, captured once and launched as one."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

WARM_UP_CALLS = 3  # compilation, tuning and allocation happen here, which a capture cannot hold


def side_by_side(functions: Sequence[Callable[[], Tensor]], inputs: Sequence[Tensor]) -> list:
    """Results of functions that need nothing of each other.

    In a graph that is being captured each becomes a branch, which a replay runs beside the others:
    kernels of small maps leave most of a GPU idle. What autograd runs of a function later belongs
    to its branch, too. Elsewhere they run one after the other.

    Args:
        functions: each returns a tensor, or a tuple of them, or None.
        inputs: tensors that they read. Others than these must exist until the capture ends.
    """
    if not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return [function() for function in functions]
    here = torch.cuda.current_stream(inputs[0].device)
    others = [_beside(here, i) for i in range(1, len(functions))]
    for stream in others:
        stream.wait_stream(here)
    results = [functions[0]()]
    for stream, function in zip(others, functions[1:], strict=True):
        # Memory that is given back is given out again in the order of the stream that it was taken
        # on. What another stream reads is kept to the end of the capture.
        for tensor in inputs:
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            results.append(function())
        here.wait_stream(stream)
        for tensor in _tensors(results[-1] if isinstance(results[-1], tuple) else results[-1:]):
            tensor.record_stream(here)
    return results


@functools.cache
def _beside(stream: torch.cuda.Stream, i: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream.device)


class GraphedPasses:
    """A function that runs forward and backward passes of a batch, as a CUDA graph.

    A network of many small kernels spends most of a step waiting for the host to launch them. A
    replay launches all of them at once. Random numbers still differ from call to call.

    Args:
        function: takes a batch and returns a tensor. Gradients stay where it puts them: it clears
            those of the parameters at first, and moves new ones out of the graph's own memory.
        example: a batch; all later ones have its shape, dtype and strides.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], example: Tensor):
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
        torch.cuda.current_stream(example.device).wait_stream(stream)
        torch.cuda.set_rng_state(random_state, example.device)
        with _capture(self.graph, torch.cuda.Stream(example.device)):
            self.result = function(self.batch)

    def __call__(self, batch: Tensor) -> Tensor:
        """Run the passes on this batch; the result is overwritten by the next call."""
        self.batch.copy_(batch)
        self.graph.replay()
        return self.result


class GraphedUpdate:
    """Steps of optimisers, as a CUDA graph from the fourth on.

    Learning rates may change from step to step; gradients stay in the same memory.

    Args:
        optimizers: `optim.Muon` and `torch.optim.Adam`, which read a learning rate on the device.
    """

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = optimizers
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        device = self.groups[0]["params"][0].device
        self.rates = [torch.zeros((), device=device) for _ in self.groups]
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)

    def __call__(self) -> None:
        """Take a step of each optimiser."""
        plain = [dict(group) for group in self.groups]
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
            group.update(lr=rate, capturable=self.calls >= WARM_UP_CALLS)
        try:
            if self.calls < WARM_UP_CALLS:
                self._step()
            else:
                if self.calls == WARM_UP_CALLS:
                    with _capture(self.graph, self.stream):
                        self._step()
                self.graph.replay()
                # As operations on tensors do, so that what was read of weights is read again.
                increment_version([p for group in self.groups for p in group["params"]])
        finally:
            # Schedules and checkpoints see plain numbers.
            for group, values in zip(self.groups, plain, strict=True):
                group.clear()
                group.update(values)
        self.calls += 1

    def _step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Replay:
    """Runs functions without gradients, from the second call on with equal shapes as CUDA graphs.

    A graph belongs to one function, or to one method of one object, which it keeps alive. It reads
    what these refer to, such as weights, where that lay when the graph was made: new values are
    seen, new tensors are not, nor what would follow from new values on the host, such as another
    kernel where A is no longer fixed. Graphs are kept until `forget`.
    """

    def __init__(self):
        self.seen: set = set()
        self.forget()

    def forget(self) -> None:
        """Give back the memory of all graphs."""
        self.recordings: dict[tuple, _Recording] = {}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable, *args):
        """Return ``function(*args)``: tensors, or tuples or dicts of them."""
        with torch.no_grad():
            # All graphs work in the same memory: the next replay may overwrite this result.
            return _copy(next(self.stretches(_single, function, *args)))

    def stretches(self, function: Callable[..., Generator], *args) -> Generator:
        """Run a generator function; each stretch up to the next yield is a graph of its own.

        It takes and is sent tensors, which may also lie in pinned memory of the host, and yields
        what a graph has computed. Results are in the graphs' own memory: the next call of this
        object, but no later stretch of this run, may overwrite them. A run may end at any yield.
        """
        specs = ((a.shape, a.dtype, a.stride()) if isinstance(a, Tensor) else a for a in args)
        key = (function, *specs)
        if key not in self.seen:
            self.seen.add(key)
            yield from function(*args)
            return
        recording = self.recordings.pop(key, None) or _Recording(function, args, self)
        recording.fill(args)
        sent = None
        for i in itertools.count():
            # One in which an exception is raised is not put back: its generator has ended.
            self.recordings.pop(key, None)
            result = recording.replay(i, sent)
            self.recordings[key] = recording
            sent = yield result


class _Recording:
    """The graphs of one generator, which stays where the last of them ends."""

    def __init__(self, function: Callable[..., Generator], args: Sequence, replay: Replay):
        self.stream, self.pool = replay.stream, replay.pool
        self.args = [self._own(arg) for arg in args]
        self.generator = function(*self.args)
        self.stretches: list = []  # graph, what is sent to it, its result

    def fill(self, args: Sequence) -> None:
        for own, arg in zip(_tensors(self.args), _tensors(args), strict=True):
            own.copy_(arg, non_blocking=True)

    def replay(self, i: int, sent: Tensor | None):
        if i == len(self.stretches):
            self.stretches.append(self._record(sent))
        graph, own, result = self.stretches[i]
        if sent is not None:
            own.copy_(sent, non_blocking=True)
        graph.replay()
        return result

    def _record(self, sent: Tensor | None):
        graph = torch.cuda.CUDAGraph()
        own = self._own(sent)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _capture(graph, self.stream, self.pool),
        ):
            result = self.generator.send(own)
        return graph, own, result

    def _own(self, arg):
        if not isinstance(arg, Tensor):
            return arg
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.empty_like(arg, device=self.stream.device).copy_(arg)


def _single(function: Callable, *args) -> Generator:
    yield function(*args)


@contextlib.contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool=None) -> Iterator[None]:
    """Context that captures a graph; threads that load data go on using the device meanwhile.

    Libraries keep work space for each stream, which goes with the first graph that used it: graphs
    that do not end together have streams of their own.
    """
    # Python might find a graph that is no longer used, and what ends one ends a capture, too.
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        if collects:
            gc.enable()


def _tensors(args: Sequence) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _copy(result):
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, dict):
        return {key: _copy(value) for key, value in result.items()}
    return tuple(_copy(value) for value in result)
