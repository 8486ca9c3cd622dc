"""Runs jobs of compiled code on all processors, on PyTorch's own threads where that is possible.

PyTorch's OpenMP threads go on spinning for milliseconds after each of its operators, to be ready
for the next. On other threads a scan would share the processors with them; as the body of a
parallel region it starts at once. Where there is no such library, and in a forked child, where it
would wait for threads that the child lost, jobs run on threads of a pool.

Numba's `parallel` serves neither: its OpenMP layer ends a forked child that uses it, and its
workqueue layer ends the process when two threads enter it at once.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch  # noqa: F401, loads its OpenMP library

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: ThreadPoolExecutor | None = None
_forked = False


def _after_fork() -> None:
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _parallel_region() -> Callable | None:
    """GOMP_parallel(body, data, threads, flags) of the library that PyTorch uses, if it has it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        region = ctypes.CDLL(None).GOMP_parallel
        region.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        region.restype = None
        return region
    return None


def run(function: Callable, jobs: Sequence[tuple[int, ...]], args: tuple, threads: int) -> None:
    """Call `function(*job, *args)` for all jobs, on at most so many threads.

    The function releases the interpreter lock. Which thread runs a job is left to chance.
    """
    global _pool
    following = itertools.count()
    errors: list[BaseException] = []
    entered: set[int] = set()

    def work(_=None) -> None:
        try:
            entered.add(threading.get_ident())
            while not errors and (i := next(following)) < len(jobs):
                function(*jobs[i], *args)
        except BaseException as error:  # a parallel region would swallow it, an interrupt too
            errors.append(error)

    if min(threads, len(jobs)) <= 1:
        work()
    elif not _forked and (region := _parallel_region()) is not None:
        # As many threads as PyTorch takes, whatever the jobs: the library ends those left out.
        region(_Body(work), None, threads, 0)
        if threading.get_ident() not in entered:
            raise KeyboardInterrupt  # it came, and was swallowed, before the body began
    else:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mambavc-scan")
        others = [_pool.submit(work) for _ in range(min(threads, len(jobs)) - 1)]
        work()
        for other in others:
            other.result()
    if errors:
        raise errors[0]
