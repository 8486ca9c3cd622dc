"""How cost grows with resolution: operations that were counted, memory and time that were measured.

::

    python -m tools.complexity --sweep --json COUNTS
    python -m tools.benchmark --cuda --only variants --sweep --json RECORDS
    python -m tools.figures.scaling COUNTS RECORDS
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.figures import speed, style
from utils import UsageError, run_main

# What the bars are split into, in the order they are stacked.
PARTS = {
    "g_a": (("g_a",), "#0072B2"),
    "g_s": (("g_s",), "#56B4E9"),
    "h_a, h_s": (("h_a", "h_s"), "#009E73"),
    "context": (("context",), "#CC79A7"),
}
PARTS_SIZE = (512, 768)
CELL = (4.6, 3.5)  # width and height of a panel, inches
# Operation, key of its records, what the unit is of the record's, title and unit of each panel.
MEASURED = (
    ("forward", "total_mib", 1024, "memory, inference", "peak [GiB]"),
    ("step", "total_mib", 1024, "memory, training step", "peak [GiB]"),
    ("encode", "median_ms", 1000, "encoding", "seconds"),
    ("decode", "median_ms", 1000, "decoding", "seconds"),
    ("forward", "median_ms", 1000, "forward pass", "seconds"),
)
RECORD = re.compile(r"(\w+) (\d+)x(\d+)$")


def counted_lines(rows: Sequence[dict]) -> style.Lines:
    """MACs of each model at each size, in units of 10^12."""
    return style.lines_over_pixels(
        (row["model"], row["height"] * row["width"], row["macs"] / 1e12) for row in rows
    )


def measured_lines(records: Sequence[dict], operation: str, key: str, unit: float) -> style.Lines:
    """What an operation took of each model at each size at which it was measured."""

    def points() -> Iterator[tuple[str, int, float]]:
        for record in records:
            match = RECORD.match(record["name"])
            measured = record["group"] == "variants" and record.get(key) is not None
            if measured and match and match[1] == operation:
                yield record["model"], int(match[2]) * int(match[3]), record[key] / unit

    return style.lines_over_pixels(points())


def _draw_parts(axes: Axes, rows: Sequence[dict]) -> None:
    """Stacked bars of each model's MACs, split into parts of the network."""
    left = [0.0] * len(rows)
    for label, (names, colour) in PARTS.items():
        macs = [sum(row["parts"][name]["macs"] for name in names) / 1e9 for row in rows]
        axes.barh(range(len(rows)), macs, left=left, color=colour, height=0.55, label=label)
        left = [a + b for a, b in zip(left, macs, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f"  {total:.0f} G", va="center", fontsize=8.5, color=style.INK)
    axes.set_yticks(range(len(rows)), [style.NAMES.get(row["model"], row["model"]) for row in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.18 * max(row["macs"] for row in rows) / 1e9)
    axes.set_xlabel("MACs [G]")
    axes.legend(
        ncols=len(PARTS),
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        frameon=False,
        fontsize=8,
        handlelength=0.8,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    axes.set_title(f"MACs by part, {PARTS_SIZE[0]}×{PARTS_SIZE[1]}", pad=20)  # noqa: RUF001


def _draw_lines(
    axes: Axes, lines: style.Lines, colours: dict[str, str], title: str, unit: str
) -> None:
    """One line per model over the picture's size."""
    ends = style.draw_lines(axes, lines, colours, title, unit)
    axes.set(xlim=(0, None), ylim=(0, None))
    sizes = sorted({x for line in lines.values() for x, _ in line})
    # The labels of small sizes would overlap.
    sizes = [size for size in sizes if size > 0.08 * sizes[-1]]
    axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
    style.label_lines(axes, ends)


@style.styled
def draw(rows: Sequence[dict], content: dict) -> Figure:
    """Draw what was counted and what was measured.

    Args:
        rows: as tools.complexity --sweep writes them; bars by part are drawn of those of 512x768.
        content: as tools.benchmark writes it: ``machine``, and ``records`` of the group "variants".
            A quantity that was not measured gets no panel.

    Raises:
        UsageError: rows of 512x768 are missing.
    """
    bars = [row for row in rows if (row["height"], row["width"]) == PARTS_SIZE]
    if not bars:
        raise UsageError("nothing was counted at 512x768; draw a file of tools.complexity --sweep")
    panels = [(counted_lines(rows), "multiply-accumulates", "MACs [T]")]
    for operation, key, scale, title, unit in MEASURED:
        panels.append((measured_lines(content["records"], operation, key, scale), title, unit))
    panels = [panel for panel in panels if panel[0]]
    place = (0.6, 0.5, 2.95, 2.55)
    figure, (axes, *others) = style.panels(1 + len(panels), 2, CELL, place, footer=0.25)
    _, bottom, _, height = axes.get_position().bounds
    wide = figure.get_figwidth()
    axes.set_position((0.95 / wide, bottom, 3.3 / wide, height))  # names stand on the left
    _draw_parts(axes, bars)
    colours = style.colours((model for lines, _, _ in panels for model in lines), "mambavc")
    for axes, (lines, title, unit) in zip(others, panels, strict=True):
        _draw_lines(axes, lines, colours, title, unit)
    machine = content["machine"]
    default = machine.get("matmul_precision") == "highest"
    flags = "PyTorch's default flags" if default else "matrix products in TF32"
    style.note(figure, f"memory and time: {machine['device']}, {flags}, batch size 1")
    return figure


def _check(content: dict) -> None:
    for row in content["rows"]:
        row["model"], row["height"], row["width"], row["macs"], row["parts"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = style.parser(
        "scaling", "Draw what tools.complexity counted and tools.benchmark measured.", "complexity"
    )
    parser.add_argument("counts", type=Path, help="file of tools.complexity --json")
    parser.add_argument("records", type=Path, help="of tools.benchmark --only variants --json")
    args = parser.parse_args(argv)
    rows = style.read_json(args.counts, "tools.complexity", _check)["rows"]
    records = style.read_json(args.records, "tools.benchmark", speed.check)
    style.save(draw(rows, records), args.output)


if __name__ == "__main__":
    run_main(main)
