"""One look for all figures: colours that colour-blind readers tell apart, labels at the lines."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.optimize import isotonic_regression

import utils
from utils import UsageError

ACCENT = "#D55E00"  # ours; vermilion of Okabe and Ito's palette
INK = "#222222"
MUTED = "#767676"
FAINT = "#D9D9D9"
# Okabe and Ito's palette in an order that keeps neighbours far apart in lightness.
# Two of Tol's are behind them, for figures of many lines.
OTHERS = (
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#8C6D00",
    "#000000",
    "#882255",
    "#5D3FBF",
)
LABEL_GAP = 10.5  # least distance between two names of lines, in points
# How figures call the registered networks.
NAMES = {"mambavc": "MambaVC", "convvc": "CNN variant", "swinvc": "Swin variant"}

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
styled = rc_context(RC)  # decorates a function that draws

Lines = dict[str, list[tuple[float, float]]]  # (megapixels, value), smallest first, by name


def parser(name: str, description: str, picture: str = "") -> utils.ArgumentParser:
    """The command line of a figure, which is drawn to pic/ by the name of its module or another."""
    result = utils.ArgumentParser(prog=f"python -m tools.figures.{name}", description=description)
    output = Path(f"pic/{picture or name}.png")
    result.add_argument("--output", type=Path, default=output, metavar="FILE")
    return result


def panels(
    count: int,
    columns: int,
    cell: tuple[float, float],
    place: tuple[float, float, float, float],
    footer: float = 0,
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row: the figure and its axes.

    Axes stand at fixed places, so that the names beside them have room.

    Args:
        count, columns: of the panels.
        cell: width and height of a panel with all that is around its axes, in inches.
        place: left, bottom, width and height of the axes in their cell, in inches.
        footer: height of a strip below the panels, in inches.
    """
    rows = -(-count // columns)
    width, height = columns * cell[0], rows * cell[1] + footer
    left, bottom, wide, high = place
    figure = Figure((width, height))
    for i in range(count):
        x = i % columns * cell[0] + left
        y = height - (i // columns + 1) * cell[1] + bottom
        figure.add_axes((x / width, y / height, wide / width, high / height))
    return figure, figure.axes


def note(figure: Figure, text: str) -> None:
    """Write how it was measured into the lower left corner."""
    figure.text(0.01, 0.06 / figure.get_figheight(), text, fontsize=7.5, color=MUTED)


def lines_over_pixels(points: Iterable[tuple[str, int, float]]) -> Lines:
    """A line for each name, of its (name, pixels, value); one size alone makes no line."""
    found: Lines = defaultdict(list)
    for name, pixels, value in points:
        found[name].append((pixels / 1e6, value))
    return {name: sorted(line) for name, line in found.items() if len(line) > 1}


def colours(names: Iterable[str], ours: str) -> dict[str, str]:
    """Colours of names: the accent for those that contain `ours`, one of its own for each other."""
    others = itertools.cycle(OTHERS)
    return {name: ACCENT if ours in name else next(others) for name in dict.fromkeys(names)}


def draw_lines(
    axes: Axes, lines: Lines, colours: dict[str, str], title: str, unit: str
) -> list[tuple[str, float, float, str]]:
    """Draw lines over megapixels, dashed where a CUDA graph is measured.

    Returns:
        What `label_lines` needs.
    """
    ends = []
    for name, line in lines.items():
        colour = colours[name]
        look = {"linewidth": 2.2 if colour == ACCENT else 1.3, "color": colour}
        axes.plot(*zip(*line, strict=True), "o--" if "graph" in name else "o-", **look)
        ends.append((NAMES.get(name, name), *line[-1], colour))
    axes.set(title=title, xlabel="megapixels", ylabel=unit)
    return ends


def spread(
    positions: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf
) -> np.ndarray:
    """Move positions as little as possible so that neighbours are at least `gap` apart.

    The order of the positions is kept; the sum of the squares of the moves is the smallest.

    Args:
        low, high: between which they are to lie. Where there is no room for that, they begin at
            `low`.
    """
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    moved = np.empty(len(positions))
    # Less the gaps that are to lie before them, positions need only not fall.
    rising = isotonic_regression(np.array(positions)[order] - steps).x
    moved[order] = np.maximum(np.minimum(rising, high - steps[-1]), low) + steps
    return moved


def label_lines(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each line's name to the right of the axes, with a thin leader from the line's end.

    Call it when the limits of the axes and the figure's layout are final.

    Args:
        axes: where the lines are.
        ends: (name, x, y, colour) of each line's last point, in data coordinates.
    """
    if not ends:
        return
    axes.autoscale_view()  # the transforms do not see pending limits
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [to_axes.transform((x, y)) for _, x, y, _ in ends]
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    heights = spread([y for _, y in points], LABEL_GAP / height, 0, 1)
    for (name, _, _, colour), (x, y), label_y in zip(ends, points, heights, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xycoords="axes fraction",
            xytext=(1.035, label_y),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8.5,
            fontweight="bold" if colour == ACCENT else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def label_point(axes: Axes, name: str, point: tuple[float, float], colour: str) -> None:
    """Write a name to the lower right of a point: rising curves leave that side free."""
    axes.annotate(
        name,
        point,
        xytext=(6, -10),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        fontweight="bold" if colour == ACCENT else "normal",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=5,
    )


def check_output(path: Path) -> None:
    """Make sure that a picture can be written there.

    Raises:
        UsageError: the folder does not exist or the ending is not a picture format.
    """
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise UsageError(f"cannot draw {path}: its ending must be one of {', '.join(known)}")
    utils.check_output(path)


@styled
def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write a figure in the format that the path's ending names, or leave the old file.

    Raises:
        UsageError: see `check_output`.
    """
    check_output(path)
    kind = path.suffix.lstrip(".").lower()
    # Dates and versions in the file would make every run differ.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with utils.atomic_write(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata.get(kind))


def read_json(path: Path, script: str, check: Callable[[dict], object]) -> dict:
    """What a program wrote to a file.

    Args:
        script: the program, for the message.
        check: touches all that a content must have; KeyError and TypeError mean that it has not.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text())
        check(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a file that {script} --json wrote ({error!r})") from None
    return content
