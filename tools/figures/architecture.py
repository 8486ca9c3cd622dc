"""The diagram of the network: codec, VSS block, scan orders and slice-wise entropy model.

::

    python -m tools.figures.architecture --output pic/architecture.png
"""

# ruff: noqa: RUF001 (the labels hold multiplication signs and Greek letters)

import inspect
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from models import MambaVC
from tools.figures import style
from utils import run_main

WIDTH, HEIGHT = 11.5, 7.6  # inches, and the units of all coordinates below

Kind = tuple[str, str]  # fill and edge of a box
CONV = ("#E3EAF2", "#5B7A99")
VSS = ("#FBE3D3", style.ACCENT)
CODING = ("#DDEFE6", "#009E73")
CONTEXT = ("#EFE6F3", "#8A6AA3")
PLAIN = ("#F4F4F4", style.MUTED)


def _text(axes: Axes, x: float, y: float, text: str, size: float = 7.5, **look) -> None:
    """Text whose middle is at x and whose baseline is at y."""
    axes.text(x, y, text, **{"fontsize": size, "ha": "center", "color": style.INK, **look})


def _title(axes: Axes, x: float, text: str, y: float = 2.9) -> None:
    _text(axes, x, y, text, 11, fontweight="bold", ha="left", va="center")


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    kind: Kind,
    size: float = 8.5,
    rotation: int = 0,
    **look,
) -> None:
    """A rounded box with its centre at (x, y)."""
    corner, shape = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.06"
    look = {"facecolor": kind[0], "edgecolor": kind[1], "linewidth": 1, "zorder": 2, **look}
    axes.add_patch(FancyBboxPatch(corner, width, height, shape, **look))
    _text(axes, x, y, text, size, va="center", rotation=rotation, linespacing=1.25, zorder=3)


def _circle(axes: Axes, x: float, y: float, sign: str) -> None:
    look = {"facecolor": "white", "edgecolor": style.INK, "linewidth": 1}
    axes.add_patch(Circle((x, y), 0.12, zorder=2, **look))
    _text(axes, x, y, sign, 11, va="center", zorder=3)


def _arrow(axes: Axes, *points: tuple[float, float], colour: str = style.INK) -> None:
    """A line through the points, with a head at the last."""
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "color": colour, "linewidth": 1}
    axes.add_patch(FancyArrowPatch(path=Path(points), joinstyle="round", zorder=1, **look))


def _chain(
    axes: Axes,
    y: float,
    boxes: Sequence[tuple[float, float, float, str, Kind]],
    size: float = 8.5,
    backwards: bool = False,
) -> None:
    """Upright boxes (x, width, height, text, kind), with arrows to the right, or to the left."""
    for x, width, height, text, kind in boxes:
        _box(axes, x, y, width, height, text, kind, size, rotation=90)
    for (x, width, *_), (x_next, width_next, *_) in pairwise(boxes):
        ends = (x + width / 2, y), (x_next - width_next / 2, y)
        _arrow(axes, *(ends[::-1] if backwards else ends))


def _tensor(axes: Axes, x: float, y: float, name: str, size: str = "") -> None:
    """The name of a tensor in the flow, with its size below."""
    _text(axes, x, y, name, 13, va="center", style="italic")
    _text(axes, x, y - 0.34, size, va="center", color=style.MUTED)


def _mirrored(text: str) -> str:
    """The decoder's layer that undoes a layer of the encoder."""
    return text.replace("conv", "deconv").replace("↓", "↑")


def _codec(axes: Axes, depths: Sequence[int]) -> None:
    """g_a and h_a from left to right, h_s, the slices and g_s back."""
    L1, L2, L3, L4 = depths
    top, bottom, step = 6.35, 4.1, 0.56
    _title(axes, 0.15, "a   Codec", y=7.4)

    heights = (1.5, 1.5, 1.36, 1.36, 1.22, 1.22, 1.08)
    texts = ("conv 5×5 ↓2", f"VSS × {L1}", "conv 3×3 ↓2", f"VSS × {L2}", "conv 3×3 ↓2",
             f"VSS × {L3}", "conv 3×3 ↓2")  # fmt: skip
    kinds = (CONV, VSS) * 3 + (CONV,)
    x0 = 1.15
    xs = [x0 + i * step for i in range(7)]
    down = [(x, 0.42, *box) for x, *box in zip(xs, heights, texts, kinds, strict=True)]
    up = [(x, width, height, _mirrored(text), kind) for x, width, height, text, kind in down]
    _chain(axes, top, down)
    _chain(axes, bottom, up, backwards=True)
    x_last = xs[-1]
    _text(axes, (x0 + x_last) / 2, top + 0.93, "analysis  $g_a$", 9)
    _text(axes, (x0 + x_last) / 2, bottom - 1.0, "synthesis  $g_s$", 9)

    _tensor(axes, 0.42, top, "$x$", "H × W × 3")
    _tensor(axes, 0.42, bottom, r"$\hat{x}$", "H × W × 3")
    _arrow(axes, (0.6, top), (x0 - 0.21, top))
    _arrow(axes, (x0 - 0.21, bottom), (0.6, bottom))

    x_y = 5.55
    _tensor(axes, x_y, top, "$y$")
    _text(axes, x_y + 0.12, top - 0.42, "H/16 × W/16 × M", color=style.MUTED, ha="left")
    _arrow(axes, (x_last + 0.21, top), (x_y - 0.17, top))

    # Hyperprior.
    x_h = 7.0
    hyper = (("conv 3×3 ↓2", CONV), (f"VSS × {L4}", VSS), ("conv 3×3 ↓2", CONV))
    heights = (1.08, 0.98, 0.9)
    down = [(x_h + i * step, 0.42, heights[i], *layer) for i, layer in enumerate(hyper)]
    _chain(axes, top, down, size=7.8)
    _arrow(axes, (x_y + 0.17, top), (x_h - 0.21, top))
    _text(axes, x_h + step, top + 0.7, "$h_a$", 9)
    x_z = 9.05
    _tensor(axes, x_z, top, "$z$", "H/64 × W/64 × Z")
    _arrow(axes, (x_h + 2 * step + 0.21, top), (x_z - 0.17, top))
    _arrow(axes, (x_z + 0.17, top), (9.62, top))
    _box(axes, 10.45, top, 1.6, 0.7, "round, entropy code\n(factorised)", CODING)
    _arrow(axes, (10.45, top - 0.35), (10.45, bottom + 0.22))
    _text(axes, 10.33, 5.3, "bits of $z$", 8, ha="right", va="center")
    _tensor(axes, 10.45, bottom, r"$\hat{z}$")

    x_s = x_h + 0.9
    for i, (text, kind) in enumerate(hyper):
        x = x_s + i * step
        _box(axes, x + 0.07, bottom + 0.07, 0.42, 1.12, "", kind)
        _box(axes, x, bottom, 0.42, 1.12, _mirrored(text), kind, 7.8, rotation=90)
    _arrow(axes, (10.27, bottom), (x_s + 2 * step + 0.28, bottom))
    for i in (1, 2):
        _arrow(axes, (x_s + i * step - 0.21, bottom), (x_s + (i - 1) * step + 0.28, bottom))
    _text(axes, x_s + step, bottom - 0.85, r"$h_{mean\_s}$, $h_{scale\_s}$", 9)

    # Slices.
    _box(axes, 6.35, bottom, 1.6, 1.0, "slice-wise\nentropy model\n(panel d)", CONTEXT)
    _arrow(axes, (x_s - 0.21, bottom), (7.15, bottom))
    _box(axes, x_y, 5.32, 1.5, 0.5, "round, entropy code", CODING)
    _arrow(axes, (x_y, top - 0.22), (x_y, 5.57))
    _arrow(axes, (6.3, 5.32), (6.95, 5.32))
    _text(axes, 7.03, 5.32, "bits of $y$", 8, ha="left", va="center")
    _arrow(axes, (6.1, bottom + 0.5), (6.1, 5.07))
    _text(axes, 6.17, 4.83, r"$\mu, \sigma$", 9, ha="left", va="center")
    _tensor(axes, 5.02, bottom, r"$\hat{y}$")
    _arrow(axes, (5.02, 5.07), (5.02, bottom + 0.22))
    _arrow(axes, (5.2, bottom), (5.55, bottom))
    _arrow(axes, (4.87, bottom), (x_last + 0.21, bottom))


def _vss(axes: Axes) -> None:
    """The block and what is inside SS2D."""
    y = 1.75
    _title(axes, 0.15, "b   VSS block")
    _arrow(axes, (0.2, y), (0.55, y))
    boxes = (
        (0.72, 0.36, 1.55, "LayerNorm", PLAIN),
        (1.3, 0.36, 1.55, "linear C→4C", CONV),
        (1.98, 0.36, 1.55, "depthwise 3×3, SiLU", CONV),
        (2.72, 0.56, 1.55, "4-direction\nselective scan", VSS),
        (3.44, 0.36, 1.55, "LayerNorm", PLAIN),
    )
    _chain(axes, y, boxes, size=8)
    _text(axes, 1.63, y + 0.1, "$x$", 9, style="italic")
    _text(axes, 1.72, 0.72, "$z$", 9, style="italic")
    _arrow(axes, (1.48, 1.15), (1.55, 1.15), (1.55, 0.6), (2.5, 0.6))
    _box(axes, 2.72, 0.6, 0.56, 0.3, "SiLU", CONV, 8)
    _arrow(axes, (3.0, 0.6), (3.9, 0.6), (3.9, y - 0.12))
    _circle(axes, 3.9, y, "×")
    _arrow(axes, (3.62, y), (3.78, y))
    _box(axes, 4.36, y, 0.36, 1.55, "linear 2C→C", CONV, 8, rotation=90)
    _arrow(axes, (4.02, y), (4.18, y))
    _circle(axes, 4.82, y, "+")
    _arrow(axes, (4.54, y), (4.7, y))
    _arrow(axes, (4.94, y), (5.2, y))
    _arrow(axes, (0.35, y), (0.35, 2.67), (4.82, 2.67), (4.82, y + 0.12))
    dashed = {"linestyle": (0, (3, 2)), "linewidth": 0.8, "zorder": 1}
    _box(axes, 2.81, 1.47, 3.58, 2.22, "", ("none", style.MUTED), **dashed)
    _text(axes, 2.81, 0.2, "two-dimensional selective scan (SS2D)", color=style.MUTED)


def _orders(axes: Axes) -> None:
    """The four orders in which the scan walks over a map, and its recurrence."""
    _title(axes, 5.6, "c   Scan orders")
    side, cells = 0.24, 3
    titles = ("rows", "columns", "rows, reversed", "columns, reversed")
    for k, title in enumerate(titles):
        x0, y0 = 5.68 + (k % 2) * 1.2, 1.68 - (k // 2) * 1.22
        path = [(j, cells - 1 - i) for i in range(cells) for j in range(cells)]
        if k % 2:
            path = [(i, cells - 1 - j) for i in range(cells) for j in range(cells)]
        if k >= 2:
            path.reverse()
        for i in range(cells + 1):
            grid = {"color": style.FAINT, "linewidth": 1, "zorder": 1}
            axes.plot([x0, x0 + cells * side], [y0 + i * side] * 2, **grid)
            axes.plot([x0 + i * side] * 2, [y0, y0 + cells * side], **grid)
        points = [(x0 + (a + 0.5) * side, y0 + (b + 0.5) * side) for a, b in path]
        axes.plot(*points[0], "o", color=style.ACCENT, markersize=4, zorder=3)
        _arrow(axes, *points, colour=style.ACCENT)
        _text(axes, x0 + cells * side / 2, y0 + cells * side + 0.1, title)
    recurrence = r"$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t,\;\; y_t = C_t h_t + D x_t$"
    _text(axes, 6.65, 0.2, recurrence, 8)


def _slices(axes: Axes, num_slices: int) -> None:
    """How slice i of y is predicted from the hyperprior and the slices before it."""
    x0 = 8.25
    _title(axes, x0, "d   Slice-wise entropy model")
    for i in range(num_slices):
        kind = CONTEXT if i < 2 else (("#FFFFFF", CONTEXT[1]) if i > 2 else CODING)
        _box(axes, x0 + 0.25, 0.62 + 0.4 * i, 0.4, 0.32, f"$y_{i + 1}$", kind, 9)
    _text(axes, x0 + 0.25, 0.2, "slices of y", color=style.MUTED)
    _arrow(axes, (x0 + 0.45, 0.82), (x0 + 0.62, 0.82), (x0 + 0.62, 1.55), (x0 + 0.8, 1.55))
    _text(axes, x0 + 0.66, 0.74, "decoded", ha="left", va="center", color=style.MUTED)
    _text(axes, x0 + 0.78, 2.36, r"$h_{mean\_s}$, $h_{scale\_s}$", 8, ha="left", va="center")
    _arrow(axes, (x0 + 0.74, 2.36), (x0 + 0.62, 2.36), (x0 + 0.62, 1.75), (x0 + 0.8, 1.75))
    _box(axes, x0 + 1.15, 1.65, 0.7, 0.8, "Swin\nattention", CONTEXT, 8)
    _box(axes, x0 + 2.1, 1.65, 0.7, 0.8, "3 × conv\n3×3", CONV, 8)
    _arrow(axes, (x0 + 1.5, 1.65), (x0 + 1.75, 1.65))
    _arrow(axes, (x0 + 2.45, 1.65), (x0 + 2.65, 1.65))
    _text(axes, x0 + 2.7, 1.65, r"$\mu_3, \sigma_3$", 9, ha="left", va="center")
    _box(axes, x0 + 2.1, 0.65, 1.5, 0.4, r"$\hat{y}_3$ = round + LRP", CODING, 8)
    _arrow(axes, (x0 + 3.0, 1.5), (x0 + 3.0, 0.65), (x0 + 2.85, 0.65))
    _text(axes, x0 + 1.62, 1.12, "own weights for μ and for σ", color=style.MUTED)
    _text(axes, x0 + 2.1, 0.2, "LRP: latent residual prediction", color=style.MUTED)


@style.styled
def draw() -> Figure:
    """Draw the diagram of the default `MambaVC`."""
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(MambaVC).parameters.items()
    }
    figure = Figure((WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")
    _codec(axes, defaults["depths"])
    _vss(axes)
    _orders(axes)
    _slices(axes, defaults["num_slices"])
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = style.parser("architecture", "Draw the diagram of the network.")
    style.save(draw(), parser.parse_args(argv).output)


if __name__ == "__main__":
    run_main(main)
