"""Time and memory of the network against the picture's size, from a file of tools.benchmark.

::

    python -m tools.benchmark --cuda --only network --json FILE
    python -m tools.figures.speed FILE --before OLDER --output pic/speed.png
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tools.figures import style
from utils import UsageError, run_main

OURS, GRAPHED = "ours", "ours, CUDA graph"
NAMES = {
    "triton": OURS,
    "cpu": OURS,
    "mamba_ssm": "mamba-ssm's scan",
    "published": "published code",
}
PANELS = {
    "median_ms": ("forward pass", "ms", 1, (3, 10, 30, 100, 300, 1000)),
    "peak_mib": ("its peak memory", "GiB", 1024, (0.1, 0.3, 1, 3, 10, 30)),
}  # title, unit, what the unit is of the record's, ticks
MEGAPIXELS = (0.1, 0.4, 1, 2, 4, 8)
GROUPS = ("network", "scaling")  # older files have the passes of each backend in the second
FORWARD = re.compile(r"forward (\d+)x(\d+)( graph)?$")


def lines(records: Sequence[dict], key: str) -> style.Lines:
    """What each backend needs at each size, of the first network that was measured."""
    passes = [
        record
        for record in records
        if record["group"] in GROUPS
        and FORWARD.match(record["name"])
        and record.get(key) is not None
    ]

    def points() -> Iterator[tuple[str, int, float]]:
        for record in passes:
            height, width, graphed = FORWARD.match(record["name"]).groups()
            # Older files also have an unnamed backend, "auto"; it is one of the others.
            name = GRAPHED if graphed else NAMES.get(record["backend"])
            if name and record.get("model") == passes[0].get("model"):
                yield name, int(height) * int(width), record[key] / PANELS[key][2]

    return style.lines_over_pixels(points())


def with_before(found: style.Lines, before: style.Lines) -> style.Lines:
    """Lines, with those of an older file: ours from CUDA graphs, and of others what is missing."""
    before = dict(before)
    graphed = before.pop(GRAPHED, None)
    before.pop(OURS, None)
    return before | found | ({"before, CUDA graph": graphed} if graphed else {})


@style.styled
def draw(content: dict, before: dict | None = None) -> Figure:
    """Draw time and, where it was measured, memory over megapixels.

    Args:
        content: as tools.benchmark writes it: ``machine``, and ``records`` of the group "network".
        before: the same of an older measurement, for comparison.

    Raises:
        UsageError: there is nothing to draw.
    """
    older = before["records"] if before else []
    quantities = {
        key: with_before(lines(content["records"], key), lines(older, key)) for key in PANELS
    }
    quantities = {key: found for key, found in quantities.items() if found}
    if not quantities:
        raise UsageError("nothing to draw; expected records of tools.benchmark --only network")
    count = len(quantities)
    figure, row = style.panels(count, count, (4.6, 3.5), (0.6, 0.55, 2.6, 2.5))
    for axes, (key, found) in zip(row, quantities.items(), strict=True):
        axes.set(xscale="log", yscale="log")
        colours = style.colours(found, OURS)
        title, unit, _, ticks = PANELS[key]
        ends = style.draw_lines(axes, found, colours, title, unit)
        for axis, places in ((axes.xaxis, MEGAPIXELS), (axes.yaxis, ticks)):
            low, high = axis.get_view_interval()
            shown = [place for place in places if low <= place <= high]
            axis.set_ticks(shown, [f"{place:g}" for place in shown])
            axis.set_ticks([], minor=True)
        style.label_lines(axes, ends)
    note = _machine(content)
    if before:
        note += f"; before, and code of others: {_machine(before)}"
    style.note(figure, note)
    return figure


def _machine(content: dict) -> str:
    return f"{content['machine']['device']}, PyTorch {content['machine']['torch']}"


def check(content: dict) -> None:
    """Touch what a file of tools.benchmark holds, for `style.read_json`."""
    content["machine"]["device"], content["machine"]["torch"]
    for record in content["records"]:
        record["group"], record["name"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = style.parser("speed", "Draw a file that tools.benchmark wrote.")
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--before",
        type=Path,
        metavar="FILE",
        help="an older one, for a line to compare with, and for other codes' lines that the new "
        "one lacks",
    )
    args = parser.parse_args(argv)
    content, before = (
        style.read_json(file, "tools.benchmark", check) if file else None
        for file in (args.file, args.before)
    )
    style.save(draw(content, before), args.output)


if __name__ == "__main__":
    run_main(main)
