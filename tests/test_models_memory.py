"""What a process keeps of the memory it frees. See test_codec.py for pictures that do not fit."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Pages that a second block of 64 MB takes from the system, and what is held once it is freed.
PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np
from models import memory

def taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(1 << 26, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) >> 10

if sys.argv[1] == "keep":
    memory.keep_freed_memory()
taken()
again, kept = taken(), held()
memory.give_back_memory()
print(again, kept - held())
"""


def run(mode):
    command = [sys.executable, "-c", PROGRAM, mode]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [int(value) for value in result.stdout.split()]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or float(platform.libc_ver()[1]) < 2.35,
    reason="needs glibc 2.35",
)
def test_freed_memory_is_used_again_and_given_back():
    faults, _ = run("as it is")
    faults_kept, given_back = run("keep")
    assert faults_kept < faults / 4  # a page may be of 4 KiB or of 2 MiB
    assert given_back >= 60  # MiB
