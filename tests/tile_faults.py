"""Faults of pictures in tiles, by the hundred: python tests/tile_faults.py [--processes N]

Damaged and hostile files must be refused in one line, or decode to the right picture; processes
that are interrupted, or cannot write, must leave nothing behind. Counts are printed, and what goes
wrong, which ends with 1. The tests try a part of it, since all of it takes minutes.
"""

import argparse
import collections
import contextlib
import io
import itertools
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import save_checkpoint, spread_model  # noqa: E402
from PIL import Image  # noqa: E402

import codec  # noqa: E402
from models import container  # noqa: E402
from utils import DataError, UsageError  # noqa: E402

counts = collections.Counter()
failures = []


def flip(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def header_end(data):
    """Where the header's checksum begins."""
    return len(data) - sum(map(len, container.unpack(data).tiles)) - 4


def seal(header, tiles):
    """A file of this header, without its checksum, and tiles, without theirs; all made to fit."""
    seed = zlib.crc32(header)
    out = header + struct.pack("<I", seed)
    for number, body in enumerate(tiles):
        crc = zlib.crc32(body, zlib.crc32(struct.pack("<II", seed, number)))
        out += body + struct.pack("<I", crc)
    return out


def attempt(kind, data, checkpoint, right, *flags, may_differ=False):
    """Decode with codec.py's main function; nothing but one line or the right picture may come."""
    counts[kind] += 1
    Path("x.mvc").write_bytes(data)
    Path("x.png").unlink(missing_ok=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            codec.main(["decode", "x.mvc", "x.png", "--checkpoint", checkpoint, *flags])
    except (DataError, UsageError) as error:
        if "\n" in str(error):
            failures.append(f"{kind}: {error}")
        if Path("x.png").exists() and "filled with the mean" not in str(error):
            failures.append(f"{kind}: a picture was left")
    except BaseException as error:
        failures.append(f"{kind}: {error!r}")
    else:
        if Image.open("x.png").tobytes() != right and not may_differ:
            failures.append(f"{kind}: a wrong picture")
    if leftovers := [p.name for p in Path().iterdir() if p.name.startswith(".")]:
        failures.append(f"{kind}: {leftovers} left")


def damage(data, checkpoint, right):
    """Files that were damaged by accident or on purpose."""
    rng = random.Random(0)
    stream = container.unpack(data)
    end = header_end(data)
    for length in range(len(data)):
        attempt("cut", data[:length], checkpoint, right)
    for length in range(0, len(data), 40):
        attempt("cut, salvaged", data[:length], checkpoint, right, "--salvage")
    for bit in range(8 * (end + 4)):
        attempt("bit of the header", flip(data, bit), checkpoint, right)
    start = end + 4
    for tile in stream.tiles:
        bits = [*range(8 * start, 8 * start + 32)]
        bits += range(8 * (start + len(tile) - 8), 8 * (start + len(tile)))
        bits += [rng.randrange(8 * start, 8 * (start + len(tile))) for _ in range(20)]
        for bit in bits:
            attempt("bit of a tile", flip(data, bit), checkpoint, right)
        start += len(tile)
    head, tiles = data[: end + 4], stream.tiles
    for i, j in itertools.permutations(range(len(tiles)), 2):
        changed = [*tiles]
        changed[i], changed[j] = tiles[j], tiles[i]
        attempt("tiles exchanged", head + b"".join(changed), checkpoint, right)
        changed = [*tiles]
        changed[i] = tiles[j]
        attempt("tile repeated", head + b"".join(changed), checkpoint, right)
    # The same with checksums that fit: symbols come out wrong, or the picture is another one.
    bodies = [tile[:-4] for tile in tiles]
    for bit in range(8 * 8, 8 * end):
        header = flip(data[:end], bit)
        attempt("sealed header", seal(header, bodies), checkpoint, right, may_differ=True)
    for _ in range(300):
        i = rng.randrange(len(bodies))
        changed = [*bodies]
        changed[i] = flip(bodies[i], rng.randrange(8 * len(bodies[i])))
        attempt("sealed tile", seal(data[:end], changed), checkpoint, right)
    for height, width in itertools.product((1, 64, 65_535, 2**20, 2**27, 2**32 - 1), repeat=2):
        for tile in (0, 1, 255):
            header = bytearray(data[:8] + b"\xff\xff")
            for side in (height, width):
                while side >= 0x80:
                    header.append(side & 0x7F | 0x80)
                    side >>= 7
                header.append(side)
            header += bytes([tile, 2, 0, 0]) + bytes([12]) * 100
            attempt("size", seal(bytes(header), [b""] * 100), checkpoint, right)
    for _ in range(200):
        values = [rng.choice((0, 1, 50, 149, 150, 151, 10**6, 2**40)) for _ in range(4)]
        x, y, width, height = values
        inside = x + width <= 150 and y + height <= 170 and width and height
        if not inside:
            attempt("region outside", data, checkpoint, right, "--region", *map(str, values))


def processes(checkpoint, number):
    """Processes that are stopped, or cannot write."""
    rng = random.Random(0)
    program = [sys.executable, ROOT / "codec.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    Image.open("a.png").resize((1200, 900)).save("large.png")
    tail = ["--checkpoint", checkpoint, "--force"]
    subprocess.run(
        [*program, "encode", "large.png", "large.mvc", *tail, "--tile-size", "64"], check=True
    )
    before = sorted(p.name for p in Path().iterdir())
    work = {
        "encode": ["large.png", "out.mvc", *tail, "--tile-size", "64"],
        "decode": ["large.mvc", "out.png", *tail],
    }

    def check(kind, process, codes):
        counts[kind] += 1
        said, errors = process.communicate(timeout=300)
        if process.returncode == -signal.SIGINT and b"bpp" in (said or b""):
            return  # all was done: while Python ends, its handler is gone
        lines = [line for line in errors.splitlines() if b" tiles, " not in line]  # progress
        if process.returncode not in codes or len(lines) > 1:
            failures.append(f"{kind}: code {process.returncode}, {errors.decode()[-300:]}")

    def check_leftovers(kind):
        for path in [*Path().glob("out.*")]:
            if path.suffix == ".png":
                Image.open(path).load()  # it is a whole one
            path.unlink()
        now = sorted(p.name for p in Path().iterdir())
        if now != before:
            failures.append(f"{kind}: {sorted(set(now) ^ set(before))} left")

    # A shell's background jobs, of which this may be one, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    for i in range(number):
        command = ("encode", "decode")[i % 2]
        process = subprocess.Popen([*program, command, *work[command]], **options)
        time.sleep(rng.uniform(0.5, 12))  # Python itself, while it starts, prints a traceback
        process.send_signal(signal.SIGINT)
        check("SIGINT", process, (0, 130))
        check_leftovers("SIGINT")
    for i in range(max(2, number // 10)):
        command = ("encode", "decode")[i % 2]
        pair = [subprocess.Popen([*program, command, *work[command]], **options) for _ in "ab"]
        for process in pair:
            check("two on one output", process, (0,))
        check_leftovers("two on one output")
        process = subprocess.Popen(
            [*program, command, *work[command]],
            **options,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
        )
        check("no room", process, (2,))
        check_leftovers("no room")
        process = subprocess.Popen([*program, command, work[command][0], "-", *tail], **options)
        process.stdout.close()
        process.stdout = None
        check("reader that leaves", process, (141,))
        check_leftovers("reader that leaves")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=40, help="to interrupt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        checkpoint = save_checkpoint(spread_model(), "tiny.pth.tar")
        small = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(small).resize((150, 170)).save("a.png")
        arguments = ["a.png", "a.mvc", "--checkpoint", checkpoint, "--tile-size", "64"]
        codec.main(["encode", *arguments])
        codec.main(["decode", "a.mvc", "a-back.png", "--checkpoint", checkpoint])
        damage(Path("a.mvc").read_bytes(), checkpoint, Image.open("a-back.png").tobytes())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"peak of memory {peak:.2f} GiB")
        for name in ("x.mvc", "x.png"):
            Path(name).unlink(missing_ok=True)
        processes(checkpoint, args.processes)
        os.chdir(ROOT)
    for kind, count in counts.items():
        print(f"{count:6} {kind}")
    print(f"{counts.total():6} in all, {len(failures)} failures")
    for failure in failures[:20]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
