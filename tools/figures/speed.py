"""Time and memory of the network against the picture's size, from a file of benchmark.py.

::

    python benchmark.py --cuda --only network scaling --json FILE
    python -m tools.figures.speed FILE --output pic/speed.png
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tools.figures import style
from utils import UsageError, run_main

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
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.5  # inches
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


def draw(content: dict, output: Path) -> None:
    """Draw time and, where it was measured, memory over megapixels into a picture file.

    Args:
        content: as benchmark.py writes it: ``machine``, and ``records`` of the groups "scaling"
            and "network".

    Raises:
        UsageError: there is nothing to draw.
    """
    panels = {key: lines(content["records"], key) for key in PANELS}
    panels = {key: found for key, found in panels.items() if found}
    if not panels:
        raise UsageError("nothing to draw; expected records of benchmark.py --only scaling")
    with plt.rc_context(style.RC):
        size = (len(panels) * PANEL_WIDTH, PANEL_HEIGHT)
        figure = plt.figure(figsize=size)
        for i, (key, found) in enumerate(panels.items()):
            # Fixed places, so that the names beside the axes have room.
            place = (i * PANEL_WIDTH + 0.6, 0.55, 2.6, 2.5)
            axes = figure.add_axes(
                (place[0] / size[0], place[1] / size[1], place[2] / size[0], place[3] / size[1])
            )
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
        text = f"{machine['device']}, PyTorch {machine['torch']}"
        figure.text(0.01, 0.06 / size[1], text, fontsize=7.5, color=style.MUTED)
        style.save(figure, output)
        plt.close(figure)


def _check(content: dict) -> None:
    content["machine"]["device"], content["machine"]["torch"]
    for record in content["records"]:
        record["group"], record["name"]


def main(argv: Sequence[str] | None = None) -> None:
    style.draw_file("speed", "benchmark.py", "pic/speed.png", _check, draw, argv)


if __name__ == "__main__":
    run_main(main)
