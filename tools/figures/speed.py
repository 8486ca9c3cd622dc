"""Time and memory of the network against the picture's size, from a file of tools.benchmark.

::

    python -m tools.benchmark --cuda --only network scaling --json FILE
    python -m tools.figures.speed FILE --output pic/speed.png
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tools.figures import style
from utils import ArgumentParser, UsageError, run_main

NAMES = {
    "triton": "ours",
    "cpu": "ours",
    "mamba_ssm": "mamba-ssm's scan",
    "published": "published code",
}
PANELS = {
    "median_ms": ("forward pass", "ms", 1, (30, 100, 300, 1000)),
    "peak_mib": ("its peak memory", "GiB", 1024, (0.3, 1, 3, 10, 30)),
}  # title, unit, what the unit is of the record's, ticks
MEGAPIXELS = (0.1, 0.4, 1, 2, 4, 8)
FORWARD = re.compile(r"forward (\d+)x(\d+)( graph)?$")

Line = list[tuple[float, float]]  # (megapixels, value)


def lines(records: Sequence[dict], key: str) -> dict[str, Line]:
    """What each backend needs at each size, smallest first, by the backend's name."""
    unit = PANELS[key][2]
    found: dict[str, Line] = defaultdict(list)
    for record in records:
        match = FORWARD.match(record["name"])
        if match is None or record.get(key) is None:
            continue
        if record["group"] == "scaling":
            name = NAMES.get(record["backend"], record["backend"])
        elif record["group"] == "network" and match[3]:
            name = "ours, CUDA graph"
        else:
            continue
        found[name].append((int(match[1]) * int(match[2]) / 1e6, record[key] / unit))
    return {name: sorted(line) for name, line in found.items() if len(line) > 1}


@style.styled
def draw(content: dict) -> Figure:
    """Draw time and, where it was measured, memory over megapixels.

    Args:
        content: as tools.benchmark writes it: ``machine``, and ``records`` of the groups "scaling"
            and "network".

    Raises:
        UsageError: there is nothing to draw.
    """
    quantities = {key: lines(content["records"], key) for key in PANELS}
    quantities = {key: found for key, found in quantities.items() if found}
    if not quantities:
        raise UsageError("nothing to draw; expected records of tools.benchmark --only scaling")
    count = len(quantities)
    figure, row = style.panels(count, count, (4.6, 3.5), (0.6, 0.55, 2.6, 2.5))
    for axes, (key, found) in zip(row, quantities.items(), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        others = iter(style.OTHERS * len(found))
        ends = []
        for name, line in found.items():
            ours = name.startswith("ours")
            colour = style.ACCENT if ours else next(others)
            x, y = zip(*line, strict=True)
            look = {"color": colour, "linestyle": "--" if "graph" in name else "-"}
            axes.plot(x, y, marker="o", linewidth=2.2 if ours else 1.3, **look)
            ends.append((name, x[-1], y[-1], colour))
        title, unit, _, ticks = PANELS[key]
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("megapixels")
        for axis, places in ((axes.xaxis, MEGAPIXELS), (axes.yaxis, ticks)):
            low, high = axis.get_view_interval()
            axis.set_major_locator(FixedLocator([t for t in places if low <= t <= high]))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        style.label_lines(axes, ends)
    machine = content["machine"]
    style.note(figure, f"{machine['device']}, PyTorch {machine['torch']}")
    return figure


def check(content: dict) -> None:
    """Touch what a file of tools.benchmark holds, for `style.read_json`."""
    content["machine"]["device"], content["machine"]["torch"]
    for record in content["records"]:
        record["group"], record["name"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m tools.figures.speed", description="Draw a file that tools.benchmark wrote."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=Path("pic/speed.png"), metavar="FILE")
    args = parser.parse_args(argv)
    style.save(draw(style.read_json(args.file, "tools.benchmark", check)), args.output)


if __name__ == "__main__":
    run_main(main)
