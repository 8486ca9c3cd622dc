"""The diagram of the network: codec, VSS block, scan orders and slice-wise entropy model.

::

    python -m tools.figures.architecture --output pic/architecture.png
"""

# ruff: noqa: RUF001 (the labels hold multiplication signs and Greek letters)

import inspect
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from models import MambaVC
from tools.figures import style
from utils import ArgumentParser, run_main

WIDTH, HEIGHT = 11.5, 7.6  # inches, and the units of all coordinates below

# Fill and edge of the kinds of boxes.
CONV = ("#E3EAF2", "#5B7A99")
VSS = ("#FBE3D3", style.ACCENT)
CODING = ("#DDEFE6", "#009E73")
CONTEXT = ("#EFE6F3", "#8A6AA3")
PLAIN = ("#F4F4F4", style.MUTED)
TITLE = {"fontsize": 11, "fontweight": "bold", "ha": "left", "va": "center", "color": style.INK}


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    kind: tuple[str, str],
    rotation: int = 0,
    size: float = 8.5,
) -> None:
    """A rounded box with its centre at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=kind[0],
            edgecolor=kind[1],
            linewidth=1,
            zorder=2,
        )
    )
    axes.text(
        x, y, text, ha="center", va="center", rotation=rotation, fontsize=size, color=style.INK,
        linespacing=1.25, zorder=3,
    )  # fmt: skip


def _arrow(axes: Axes, *points: tuple[float, float], colour: str = style.INK, head: bool = True):
    """A line through the points, with a head at the last."""
    if len(points) > 2:
        xs, ys = zip(*points[:-1], strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1, zorder=1, solid_joinstyle="round")
    axes.annotate(
        "",
        xy=points[-1],
        xytext=points[-2],
        arrowprops={
            "arrowstyle": "-|>" if head else "-",
            "color": colour,
            "linewidth": 1,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 9,
        },
        zorder=1,
    )


def _tensor(axes: Axes, x: float, y: float, name: str, size: str = "") -> None:
    """The name of a tensor in the flow, with its size below."""
    axes.text(x, y, name, ha="center", va="center", fontsize=13, style="italic", color=style.INK)
    axes.text(x, y - 0.34, size, ha="center", va="center", fontsize=7.5, color=style.MUTED)


def _codec(axes: Axes, depths: Sequence[int]) -> None:
    """g_a and h_a from left to right, h_s, the slices and g_s back."""
    L1, L2, L3, L4 = depths
    top, bottom, step = 6.35, 4.1, 0.56
    axes.text(0.15, 7.4, "a   Codec", **TITLE)

    heights = (1.5, 1.5, 1.36, 1.36, 1.22, 1.22, 1.08)
    down = ("conv 5×5 ↓2", f"VSS × {L1}", "conv 3×3 ↓2", f"VSS × {L2}", "conv 3×3 ↓2",
            f"VSS × {L3}", "conv 3×3 ↓2")  # fmt: skip
    up = ("deconv 5×5 ↑2", f"VSS × {L1}", "deconv 3×3 ↑2", f"VSS × {L2}", "deconv 3×3 ↑2",
          f"VSS × {L3}", "deconv 3×3 ↑2")  # fmt: skip
    kinds = (CONV, VSS) * 3 + (CONV,)
    x0 = 1.15
    x_last = x0 + 6 * step
    for y, texts in ((top, down), (bottom, up)):
        for i, (text, kind, height) in enumerate(zip(texts, kinds, heights, strict=True)):
            _box(axes, x0 + i * step, y, 0.42, height, text, kind, rotation=90)
    for i in range(6):
        left, right = x0 + i * step + 0.21, x0 + (i + 1) * step - 0.21
        _arrow(axes, (left, top), (right, top))
        _arrow(axes, (right, bottom), (left, bottom))
    axes.text((x0 + x_last) / 2, top + 0.93, "analysis  $g_a$", ha="center", fontsize=9)
    axes.text((x0 + x_last) / 2, bottom - 1.0, "synthesis  $g_s$", ha="center", fontsize=9)

    _tensor(axes, 0.42, top, "$x$", "H × W × 3")
    _tensor(axes, 0.42, bottom, r"$\hat{x}$", "H × W × 3")
    _arrow(axes, (0.6, top), (x0 - 0.21, top))
    _arrow(axes, (x0 - 0.21, bottom), (0.6, bottom))

    x_y = 5.55
    _tensor(axes, x_y, top, "$y$")
    axes.text(x_y + 0.12, top - 0.42, "H/16 × W/16 × M", fontsize=7.5, color=style.MUTED, ha="left")
    _arrow(axes, (x_last + 0.21, top), (x_y - 0.17, top))

    # Hyperprior.
    x_h = 7.0
    small = (1.08, 0.98, 0.9)
    hyper = (("conv 3×3 ↓2", CONV), (f"VSS × {L4}", VSS), ("conv 3×3 ↓2", CONV))
    hyper_up = (("deconv 3×3 ↑2", CONV), (f"VSS × {L4}", VSS), ("deconv 3×3 ↑2", CONV))
    for i, ((text, kind), height) in enumerate(zip(hyper, small, strict=True)):
        _box(axes, x_h + i * step, top, 0.42, height, text, kind, rotation=90, size=7.8)
    _arrow(axes, (x_y + 0.17, top), (x_h - 0.21, top))
    for i in range(2):
        _arrow(axes, (x_h + i * step + 0.21, top), (x_h + (i + 1) * step - 0.21, top))
    axes.text(x_h + step, top + 0.7, "$h_a$", ha="center", fontsize=9)
    x_z = 9.05
    _tensor(axes, x_z, top, "$z$", "H/64 × W/64 × Z")
    _arrow(axes, (x_h + 2 * step + 0.21, top), (x_z - 0.17, top))
    _arrow(axes, (x_z + 0.17, top), (9.62, top))
    _box(axes, 10.45, top, 1.6, 0.7, "round, entropy code\n(factorised)", CODING)
    _arrow(axes, (10.45, top - 0.35), (10.45, bottom + 0.22))
    axes.text(10.33, 5.3, "bits of $z$", ha="right", va="center", fontsize=8, color=style.INK)
    _tensor(axes, 10.45, bottom, r"$\hat{z}$")

    for i, (text, kind) in enumerate(hyper_up[::-1]):
        for shift in (0.07, 0.0):
            _box(axes, x_h + 0.9 + i * step + shift, bottom + shift, 0.42, 1.12, "", kind)
        axes.text(x_h + 0.9 + i * step, bottom, text, rotation=90, ha="center", va="center",
                  fontsize=7.8, color=style.INK, zorder=3)  # fmt: skip
    x_s = x_h + 0.9
    _arrow(axes, (10.27, bottom), (x_s + 2 * step + 0.28, bottom))
    for i in (1, 2):
        _arrow(axes, (x_s + i * step - 0.21, bottom), (x_s + (i - 1) * step + 0.28, bottom))
    axes.text(x_s + step, bottom - 0.85, r"$h_{mean\_s}$, $h_{scale\_s}$", ha="center", fontsize=9)

    # Slices.
    _box(axes, 6.35, bottom, 1.6, 1.0, "slice-wise\nentropy model\n(panel d)", CONTEXT)
    _arrow(axes, (x_s - 0.21, bottom), (7.15, bottom))
    _box(axes, x_y, 5.32, 1.5, 0.5, "round, entropy code", CODING)
    _arrow(axes, (x_y, top - 0.22), (x_y, 5.57))
    _arrow(axes, (6.3, 5.32), (6.95, 5.32))
    axes.text(7.03, 5.32, "bits of $y$", ha="left", va="center", fontsize=8)
    _arrow(axes, (6.1, bottom + 0.5), (6.1, 5.07))
    axes.text(6.17, 4.83, r"$\mu, \sigma$", fontsize=9, va="center")
    _tensor(axes, 5.02, bottom, r"$\hat{y}$")
    _arrow(axes, (5.02, 5.07), (5.02, bottom + 0.22))
    _arrow(axes, (5.2, bottom), (5.55, bottom))
    _arrow(axes, (4.87, bottom), (x_last + 0.21, bottom))


def _vss(axes: Axes) -> None:
    """The block and what is inside SS2D."""
    y = 1.75
    axes.text(0.15, 2.9, "b   VSS block", **TITLE)
    _arrow(axes, (0.2, y), (0.55, y))
    names = (
        ("LayerNorm", PLAIN),
        ("linear C→4C", CONV),
        ("depthwise 3×3, SiLU", CONV),
        ("4-direction\nselective scan", VSS),
        ("LayerNorm", PLAIN),
    )
    xs = (0.72, 1.3, 1.98, 2.72, 3.44)
    for x, (text, kind) in zip(xs, names, strict=True):
        width = 0.56 if "\n" in text else 0.36
        _box(axes, x, y, width, 1.55, text, kind, rotation=90, size=8)
    widths = [0.56 if "\n" in text else 0.36 for text, _ in names]
    for i in range(4):
        _arrow(axes, (xs[i] + widths[i] / 2, y), (xs[i + 1] - widths[i + 1] / 2, y))
    axes.text(1.63, y + 0.1, "$x$", ha="center", fontsize=9, style="italic")
    axes.text(1.72, 0.72, "$z$", ha="center", fontsize=9, style="italic")
    _arrow(axes, (1.48, 1.15), (1.55, 1.15), (1.55, 0.6), (2.5, 0.6))
    _box(axes, 2.72, 0.6, 0.56, 0.3, "SiLU", CONV, size=8)
    _arrow(axes, (3.0, 0.6), (3.9, 0.6), (3.9, y - 0.12))
    axes.text(3.9, y, "×", ha="center", va="center", fontsize=11, zorder=3)
    _circle(axes, 3.9, y)
    _arrow(axes, (3.62, y), (3.78, y))
    _box(axes, 4.36, y, 0.36, 1.55, "linear 2C→C", CONV, rotation=90, size=8)
    _arrow(axes, (4.02, y), (4.18, y))
    _circle(axes, 4.82, y)
    axes.text(4.82, y, "+", ha="center", va="center", fontsize=11, zorder=3)
    _arrow(axes, (4.54, y), (4.7, y))
    _arrow(axes, (4.94, y), (5.2, y))
    _arrow(axes, (0.35, y), (0.35, 2.67), (4.82, 2.67), (4.82, y + 0.12))
    axes.add_patch(
        FancyBboxPatch(
            (1.02, 0.36),
            3.58,
            2.22,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor="none",
            edgecolor=style.MUTED,
            linestyle=(0, (3, 2)),
            linewidth=0.8,
        )
    )
    axes.text(2.81, 0.2, "two-dimensional selective scan (SS2D)", ha="center",
              fontsize=7.5, color=style.MUTED)  # fmt: skip


def _circle(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(
        Circle((x, y), 0.12, facecolor="white", edgecolor=style.INK, linewidth=1, zorder=2)
    )


def _orders(axes: Axes) -> None:
    """The four orders in which the scan walks over a map, and its recurrence."""
    axes.text(5.6, 2.9, "c   Scan orders", **TITLE)
    side, cells = 0.24, 3
    titles = ("rows", "columns", "rows, reversed", "columns, reversed")
    for k, title in enumerate(titles):
        x0, y0 = 5.68 + (k % 2) * 1.2, 1.68 - (k // 2) * 1.22
        path = [(j, cells - 1 - i) for i in range(cells) for j in range(cells)]
        if k % 2:
            path = [(i, cells - 1 - j) for i in range(cells) for j in range(cells)]
        if k >= 2:
            path = path[::-1]
        for i in range(cells + 1):
            grid = {"color": style.FAINT, "linewidth": 1, "zorder": 1}
            axes.plot([x0, x0 + cells * side], [y0 + i * side] * 2, **grid)
            axes.plot([x0 + i * side] * 2, [y0, y0 + cells * side], **grid)
        points = [(x0 + (a + 0.5) * side, y0 + (b + 0.5) * side) for a, b in path]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=style.ACCENT, linewidth=1.1, zorder=2)
        axes.plot(*points[0], "o", color=style.ACCENT, markersize=4, zorder=3)
        _arrow(axes, points[-2], (points[-1][0], points[-1][1]), colour=style.ACCENT)
        axes.text(x0 + cells * side / 2, y0 + cells * side + 0.1, title, ha="center",
                  fontsize=7.5, color=style.INK)  # fmt: skip
    axes.text(
        6.65, 0.2, r"$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t,\;\; y_t = C_t h_t + D x_t$",
        ha="center", fontsize=8, color=style.INK,
    )  # fmt: skip


def _slices(axes: Axes, num_slices: int) -> None:
    """How slice i of y is predicted from the hyperprior and the slices before it."""
    x0 = 8.25
    axes.text(x0, 2.9, "d   Slice-wise entropy model", **TITLE)
    for i in range(num_slices):
        kind = CONTEXT if i < 2 else (("#FFFFFF", CONTEXT[1]) if i > 2 else CODING)
        _box(axes, x0 + 0.25, 0.62 + 0.4 * i, 0.4, 0.32, f"$y_{i + 1}$", kind, size=9)
    axes.text(x0 + 0.25, 0.2, "slices of y", ha="center", fontsize=7.5, color=style.MUTED)
    _arrow(axes, (x0 + 0.45, 0.82), (x0 + 0.62, 0.82), (x0 + 0.62, 1.55), (x0 + 0.8, 1.55))
    axes.text(x0 + 0.66, 0.74, "decoded", fontsize=7.5, va="center", color=style.MUTED)
    axes.text(x0 + 0.78, 2.36, r"$h_{mean\_s}$, $h_{scale\_s}$", fontsize=8, va="center")
    _arrow(axes, (x0 + 0.62, 2.36), (x0 + 0.62, 1.75), (x0 + 0.8, 1.75), head=True)
    axes.plot([x0 + 0.62, x0 + 0.74], [2.36, 2.36], color=style.INK, linewidth=1)
    _box(axes, x0 + 1.15, 1.65, 0.7, 0.8, "Swin\nattention", CONTEXT, size=8)
    _box(axes, x0 + 2.1, 1.65, 0.7, 0.8, "3 × conv\n3×3", CONV, size=8)
    _arrow(axes, (x0 + 1.5, 1.65), (x0 + 1.75, 1.65))
    _arrow(axes, (x0 + 2.45, 1.65), (x0 + 2.65, 1.65))
    axes.text(x0 + 2.7, 1.65, r"$\mu_3, \sigma_3$", fontsize=9, va="center")
    _box(axes, x0 + 2.1, 0.65, 1.5, 0.4, r"$\hat{y}_3$ = round + LRP", CODING, size=8)
    _arrow(axes, (x0 + 3.0, 1.5), (x0 + 3.0, 0.65), (x0 + 2.85, 0.65))
    axes.text(x0 + 1.62, 1.12, "own weights for μ and for σ", ha="center", fontsize=7.5,
              color=style.MUTED)  # fmt: skip
    axes.text(x0 + 2.1, 0.2, "LRP: latent residual prediction", ha="center", fontsize=7.5,
              color=style.MUTED)  # fmt: skip


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
    parser = ArgumentParser(
        prog="python -m tools.figures.architecture", description="Draw the diagram of the network."
    )
    parser.add_argument("--output", type=Path, default=Path("pic/architecture.png"), metavar="FILE")
    style.save(draw(), parser.parse_args(argv).output)


if __name__ == "__main__":
    run_main(main)
