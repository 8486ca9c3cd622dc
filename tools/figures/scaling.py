"""How cost grows with resolution: MACs, memory and time of a file that complexity.py wrote.

::

    python complexity.py --cuda --sweep --measure encode decode forward step --json FILE
    python -m tools.figures.scaling FILE --output pic/complexity.png
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from tools.figures import style
from utils import UsageError, run_main

# What the bars are split into, in the order they are stacked.
PARTS = {
    "g_a": (("g_a",), "#0072B2"),
    "g_s": (("g_s",), "#56B4E9"),
    "h_a, h_s": (("h_a", "h_s"), "#009E73"),
    "context": (("context",), "#CC79A7"),
}
NAMES = {"mambavc": "MambaVC", "convvc": "CNN variant", "swinvc": "Swin variant"}
PARTS_SIZE = (512, 768)
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.5  # inches


def _measured(operation: str, key: str, scale: float) -> Callable[[dict], float | None]:
    def value(row: dict) -> float | None:
        result = row["measured"].get(operation)
        return None if result is None or result[key] is None else result[key] / scale

    return value


# Title, unit and value of each line panel.
LINES = (
    ("multiply-accumulates", "MACs [T]", lambda row: row["macs"] / 1e12),
    ("memory, inference", "peak [GiB]", _measured("forward", "peak_bytes", 2**30)),
    ("memory, training step", "peak [GiB]", _measured("step", "peak_bytes", 2**30)),
    ("encoding", "seconds", _measured("encode", "seconds", 1)),
    ("decoding", "seconds", _measured("decode", "seconds", 1)),
    ("forward pass", "seconds", _measured("forward", "seconds", 1)),
)


def _colours(models: Sequence[str]) -> dict[str, str]:
    """Ours in the accent colour, whichever of its names it goes by."""
    others = iter(style.OTHERS * len(models))
    return {name: style.ACCENT if "mambavc" in name else next(others) for name in models}


def _draw_parts(axes: Axes, rows: Sequence[dict]) -> None:
    """Stacked bars of each model's MACs, split into parts of the network."""
    left = [0.0] * len(rows)
    for label, (names, colour) in PARTS.items():
        macs = [sum(row["parts"][name]["macs"] for name in names) / 1e9 for row in rows]
        axes.barh(range(len(rows)), macs, left=left, color=colour, height=0.55, label=label)
        left = [a + b for a, b in zip(left, macs, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f"  {total:.0f} G", va="center", fontsize=8.5, color=style.INK)
    axes.set_yticks(range(len(rows)), [NAMES.get(row["model"], row["model"]) for row in rows])
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


def _draw_lines(axes: Axes, rows: Sequence[dict], title: str, unit: str, value: Callable) -> None:
    """One line per model over the picture's size."""
    ends = []
    colours = _colours(list(dict.fromkeys(row["model"] for row in rows)))
    for model, colour in colours.items():
        own = sorted(
            (row["height"] * row["width"] / 1e6, value(row))
            for row in rows
            if row["model"] == model and value(row) is not None
        )
        if not own:
            continue
        x, y = zip(*own, strict=True)
        wide = colour == style.ACCENT
        axes.plot(x, y, "o-", color=colour, linewidth=2.2 if wide else 1.3, markersize=3.5 + wide)
        ends.append((NAMES.get(model, model), x[-1], y[-1], colour))
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    sizes = sorted({row["height"] * row["width"] / 1e6 for row in rows})
    # Names of small sizes would overlap.
    ticks = [size for size in sizes if size > 0.08 * sizes[-1]]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
    axes.set_xlabel("megapixels")
    style.label_lines(axes, ends)


def draw(content: dict, output: Path) -> None:
    """Draw what a complexity file holds into a picture file.

    Args:
        content: as complexity.py writes it: ``device``, ``batch_size``, and ``rows`` with model,
            height, width, macs, parts and measured. Quantities that no row has get no panel, and
            the bars by part are drawn for 512x768 rows.

    Raises:
        UsageError: there is nothing to draw.
    """
    rows = content["rows"]
    bars = [row for row in rows if (row["height"], row["width"]) == PARTS_SIZE]
    several = len({(row["height"], row["width"]) for row in rows}) > 1
    lines = [line for line in LINES if several and any(line[2](row) is not None for row in rows)]
    panels = ([None] if bars else []) + lines
    if not panels:
        raise UsageError("nothing to draw; expected rows of 512x768 or of several sizes (--sweep)")
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    with plt.rc_context(style.RC):
        footer = 0.25 if content.get("device") else 0.0
        size = (columns * PANEL_WIDTH, height * PANEL_HEIGHT + footer)
        figure = plt.figure(figsize=size)
        for i, panel in enumerate(panels):
            # Fixed places, so that the names beside the axes have room.
            left, top = (i % columns) * PANEL_WIDTH, (i // columns) * PANEL_HEIGHT
            start, wide = (0.95, 3.3) if panel is None else (0.6, 2.95)
            place = (left + start, size[1] - top - PANEL_HEIGHT + 0.5, wide, 2.55)
            axes = figure.add_axes(
                (place[0] / size[0], place[1] / size[1], place[2] / size[0], place[3] / size[1])
            )
            if panel is None:
                _draw_parts(axes, bars)
            else:
                _draw_lines(axes, rows, *panel)
        if content.get("device"):
            text = (
                f"memory and time: {content['device']}, PyTorch's default flags, "
                f"batch size {content['batch_size']}"
            )
            figure.text(0.01, 0.06 / size[1], text, fontsize=7.5, color=style.MUTED)
        style.save(figure, output)
        plt.close(figure)


def _check(content: dict) -> None:
    for row in content["rows"]:
        row["model"], row["height"], row["width"], row["macs"], row["parts"], row["measured"]


def main(argv: Sequence[str] | None = None) -> None:
    style.draw_file("scaling", "complexity.py", "pic/complexity.png", _check, draw, argv)


if __name__ == "__main__":
    run_main(main)
