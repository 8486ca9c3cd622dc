"""kernels/scan_cpu_threads.py: each job runs once, whoever runs it, and errors come back."""

import os
import signal
import threading
import time

import pytest

from kernels import scan_cpu_threads as threads

JOBS = [(i,) for i in range(20)]


@pytest.fixture(params=["region", "pool"])
def way(request, monkeypatch):
    """Both ways to run jobs; the first needs the OpenMP library of PyTorch's Linux wheels."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_parallel_region", lambda: None)
    elif threads._parallel_region() is None:
        pytest.skip("this PyTorch brings no libgomp")
    return request.param


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_each_job_runs_once(way, count):
    done = []
    threads.run(lambda i, *args: done.append((i, *args)), JOBS, ("a", 1), count)
    assert sorted(done) == [(i, "a", 1) for i in range(20)]
    threads.run(done.append, [], (), count)


def test_jobs_run_at_the_same_time(way):
    barrier = threading.Barrier(2, timeout=30)  # one thread alone would wait for the other
    threads.run(lambda i: barrier.wait(), JOBS[:2], (), 2)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_come_back_and_end_the_run(way, error):
    done = []

    def fail(i):
        done.append(i)
        time.sleep(0.01)
        raise error("job")

    with pytest.raises(error, match="job"):
        threads.run(fail, JOBS, (), 2)
    assert len(done) <= 2


def test_several_threads_may_call_at_once(way):
    done = []
    callers = [
        threading.Thread(target=threads.run, args=(done.append, JOBS, (), 2)) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(done) == sorted([i for (i,) in JOBS] * 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_threads_of_its_own(way):
    """The parent's threads do not exist there (PyTorch's own operators would wait for them)."""
    threads.run(lambda i: None, JOBS, (), 2)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for threads that are not there
        done = []
        threads.run(done.append, JOBS, (), 2)
        os._exit(0 if sorted(done) == list(range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0
