"""Rate-distortion curves and BD-rates of result files in CompressAI's format.

::

    python -m tools.figures.plot @results/rd_kodak.args
    python -m tools.figures.plot vtm-18.0 tcm-large --ours low.json,high.json --output rd.png
"""

import argparse
import itertools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import bjontegaard
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator

from tools.figures import style
from utils import ArgumentParser, UsageError, ms_ssim_db, run_main

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
DEFAULT_CURVES = ("mlic-plus-plus", "mambaic", "tcm-large", "elic", "cheng2020-anchor", "bpg")

QUALITY = {"psnr": "PSNR [dB]", "ms-ssim": "MS-SSIM [dB]"}
PANELS = (*QUALITY, "saving")
# Inches: of a panel with the names of its lines (the least height), and beside its axes.
PANEL_WIDTH, PANEL_HEIGHT, LEFT, RIGHT = 5.2, 4.0, 0.66, 1.55
DASHES = ("-", "--", ":", "-.")  # of the lines, where there are more than colours


@dataclass(frozen=True)
class Curve:
    """One codec's operating points, sorted by rate.

    Attributes:
        name: as drawn.
        bpp: bits per pixel, rising.
        quality: dB per point, for "psnr" and, where measured, "ms-ssim".
    """

    name: str
    bpp: np.ndarray
    quality: dict[str, np.ndarray]


def load_curve(source: str) -> Curve:
    """Read a curve from result files.

    Args:
        source: path of a file, or its name among the published ones; several, with commas between
            them, are joined to one curve (one file per rate, as eval.py writes them), which has
            the name of the first and what all of them measured.

    Raises:
        UsageError: there is no such file, or it does not hold rate-distortion points.
    """
    names, tables = zip(*map(_load_points, source.split(",")), strict=True)
    columns = set.intersection(*(set(table) for table in tables))
    points = {key: np.concatenate([table[key] for table in tables]) for key in columns}
    order = np.argsort(points["bpp"])
    return Curve(
        names[0],
        points["bpp"][order],
        {metric: points[metric][order] for metric in QUALITY if metric in columns},
    )


def _load_points(source: str) -> tuple[str, dict[str, np.ndarray]]:
    """Name and columns of one file: bpp and the metrics in dB."""
    path = Path(source)
    if not path.is_file():
        path = PUBLISHED / f"{source}.json"
    if not path.is_file():
        files = PUBLISHED.rglob("*.json")
        known = ", ".join(sorted(str(p.relative_to(PUBLISHED).with_suffix("")) for p in files))
        raise UsageError(f"{source} is neither a file nor one of the published curves: {known}")
    try:
        data = json.loads(path.read_text())
        # Of one picture alone, compressai.utils.eval_model writes numbers in place of lists.
        name, results = str(data["name"]), {k: _as_list(v) for k, v in data["results"].items()}
        columns = {"bpp": results["bpp"], "psnr": results["psnr-rgb"]}
        ms_ssim = results.get("ms-ssim-rgb") or [None]
        if None not in ms_ssim:
            columns["ms-ssim"] = [ms_ssim_db(value) for value in ms_ssim]
        table = {key: np.array(values, dtype=float) for key, values in columns.items()}
        sizes = {values.shape for values in table.values()}
        if len(sizes) > 1 or not table["bpp"].size or table["bpp"].min() <= 0:
            raise ValueError("lists of different lengths, no points, or a bpp of 0 or less")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} does not hold rate-distortion points ({error!r}); expected "
            '{"name": ..., "results": {"bpp": [...], "psnr-rgb": [...]}}'
        ) from None
    return name, table


def _as_list(values: object) -> list:
    return values if isinstance(values, list) else [values]


def bd_rate(anchor: Curve, curve: Curve, metric: str = "psnr", method: str = "pchip") -> float:
    """Mean difference in rate at equal quality, in percent of the anchor's (negative: saved).

    Taken over the interval of quality that both curves cover (Bjontegaard, VCEG-M33), with
    piecewise interpolation of log rate over quality in dB (`method`: "pchip" or "akima"). A curve
    of one point is compared at that quality, with PCHIP. NaN where a curve lacks the metric or
    does not rise, where the anchor has fewer than two points, or where the two do not overlap.
    """
    if metric not in anchor.quality or metric not in curve.quality:
        return math.nan
    a, b = anchor.quality[metric], curve.quality[metric]
    if not _rises(a) or not _rises(b) or _common(a, b) is None:
        return math.nan
    if len(b) == 1:
        return 100 * float(curve.bpp[0] / _rate_at(anchor, b, metric)[0] - 1)
    value = bjontegaard.bd_rate(
        anchor.bpp, a, curve.bpp, b, method, require_matching_points=False, min_overlap=0
    )
    return float(value)


def _rises(values: np.ndarray) -> bool:
    return bool((np.diff(values) > 0).all())


def _common(anchor: np.ndarray, curve: np.ndarray) -> tuple[float, float] | None:
    """Ends of the interval of quality at which two curves are compared, if there is one.

    They are equal for a curve of one point; an anchor has more.
    """
    low, high = max(anchor.min(), curve.min()), min(anchor.max(), curve.max())
    comparable = low < high or (low == high and len(anchor) > len(curve) == 1)
    return (low, high) if comparable else None


def compared_over(anchor: Curve, curve: Curve) -> str:
    """The PSNRs that a BD-rate is of, in words."""
    interval = _common(anchor.quality["psnr"], curve.quality["psnr"])
    if interval is None:
        return "no overlap"
    low, high = interval
    return f"at {low:.2f} dB" if low == high else f"{low:.1f} to {high:.1f} dB"


def bd_table(anchor: Curve, curves: Sequence[Curve], method: str = "pchip") -> str:
    """BD-rates of all curves as a Markdown table, best first by PSNR.

    "over" is the interval of PSNR that both curves cover.
    """
    rows = []
    for curve in curves:
        rates = [bd_rate(anchor, curve, metric, method) for metric in QUALITY]
        psnr, ms_ssim = ("" if math.isnan(rate) else f"{rate:+.2f} %" for rate in rates)
        over = compared_over(anchor, curve)
        rows.append((rates[0], f"| {curve.name} | {psnr} | {over} | {ms_ssim} |"))
    rows.sort(key=lambda row: math.inf if math.isnan(row[0]) else row[0])
    head = (
        f"BD-rate against {anchor.name} ({method})\n\n"
        "| codec | BD-rate, PSNR | over | BD-rate, MS-SSIM |\n|---|---:|---:|---:|"
    )
    return "\n".join([head, *(line for _, line in rows)])


def _through(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What interpolates points as a BD-rate does; through a single one, a constant."""
    return PchipInterpolator(x, y) if len(x) > 1 else lambda at: np.full_like(at, y[0])


def _rate_at(curve: Curve, quality: np.ndarray, metric: str = "psnr") -> np.ndarray:
    """Bits per pixel that a curve needs for a quality in dB."""
    return np.exp(_through(curve.quality[metric], np.log(curve.bpp))(quality))


class Limits(NamedTuple):
    """What is shown: (lowest, highest) bits per pixel, and percent saved in a saving panel."""

    bpp: tuple[float, float] = (0.08, 0.95)
    saved: tuple[float, float] = (-math.inf, math.inf)


def _line(curve: Curve, panel: str, anchor: Curve, limits: Limits, x: np.ndarray):
    """Points (x, y) of a curve in a quality or saving panel that are to be shown."""
    if panel == "saving":
        rate = _rate_at(curve, x)
        y = 100 * (1 - rate / _rate_at(anchor, x))
        shown = (y >= limits.saved[0]) & (y <= limits.saved[1])
    else:
        rate = x
        y = _through(curve.bpp, curve.quality[panel])(x)
        shown = True
    shown = shown & (rate >= limits.bpp[0]) & (rate <= limits.bpp[1])
    return x[shown], y[shown]


def _draw_line(
    axes: Axes,
    curve: Curve,
    panel: str,
    anchor: Curve,
    limits: Limits,
    colour: str,
    dashes: str,
) -> list[tuple[str, float, float, str]]:
    """Draw one curve in a quality or saving panel; return what `style.label_lines` needs."""
    points = curve.bpp
    if panel == "saving":
        points = curve.quality["psnr"]
        covered = anchor.quality["psnr"]
        points = points[(points >= covered.min()) & (points <= covered.max())]
    if not len(points):
        return []
    ours = colour == style.ACCENT
    look = {"color": colour, "zorder": 4 if ours else 3}
    dense = np.linspace(points[0], points[-1], 300)
    x, y = _line(curve, panel, anchor, limits, dense)
    axes.plot(x, y, dashes, linewidth=2.4 if ours else 1.3, **look)
    axes.plot(
        *_line(curve, panel, anchor, limits, points), "o", markersize=5 if ours else 3, **look
    )
    if not len(x):
        return []
    if len(curve.bpp) == 1:
        style.label_point(axes, curve.name, (x[0], y[0]), colour)
        return []
    return [(curve.name, x[-1], y[-1], colour)]


def _drawable(curve: Curve, panel: str, anchor: Curve) -> bool:
    """Whether a curve has what a panel shows."""
    if panel == "saving" and len(anchor.bpp) < 2:
        return False
    metric = "psnr" if panel == "saving" else panel
    return metric in curve.quality and _rises(curve.bpp) and _rises(curve.quality[metric])


@style.styled
def draw(
    ours: Sequence[Curve],
    others: Sequence[Curve],
    anchor: Curve,
    panels: Sequence[str],
    *,
    limits: Limits = Limits(),  # noqa: B008, it is a tuple
    title: str = "",
) -> Figure:
    """Draw the panels side by side.

    Args:
        ours: in the accent colour, on top.
        others, anchor: in the other colours; the anchor is also what savings are relative to.
        panels: of `PANELS`. "psnr" and "ms-ssim" are quality over bpp, "saving" is the rate saved
            at equal PSNR.
        limits: rates and savings to show.

    Raises:
        UsageError: no curve has what a panel shows.
    """
    looks = [(colour, dashes) for dashes in DASHES for colour in style.OTHERS]
    curves = [
        *zip(others, itertools.cycle(looks)),
        (anchor, (style.MUTED, "-")),
        *((curve, (style.ACCENT, "-")) for curve in ours),
    ]
    available = {
        panel: [pair for pair in curves if _drawable(pair[0], panel, anchor)] for panel in panels
    }
    names = max(len(pairs) for pairs in available.values())
    high = max(0.78 * PANEL_HEIGHT, names * style.LABEL_GAP / 72)
    place = (LEFT, 0.48, PANEL_WIDTH - LEFT - RIGHT, high)
    cell = (PANEL_WIDTH, high + 0.22 * PANEL_HEIGHT)
    figure, row = style.panels(len(panels), len(panels), cell, place)
    for axes, panel in zip(row, panels, strict=True):
        if not available[panel]:
            raise UsageError(f"no curve has the data of panel {panel}; leave the panel out")
        if panel == "saving":
            axes.set_xlabel("PSNR [dB]")
            axes.set_ylabel(f"rate saved against {anchor.name} [%]")
        else:
            axes.set_xlabel("rate [bit per pixel]")
            axes.set_ylabel(QUALITY[panel])
            axes.set_xlim(*limits.bpp)
        ends = [
            end
            for curve, look in available[panel]
            for end in _draw_line(axes, curve, panel, anchor, limits, *look)
        ]
        style.label_lines(axes, ends)
    if title:
        x = LEFT / figure.get_figwidth()
        figure.text(x, 1 - 0.2 / figure.get_figheight(), title, color=style.INK, fontweight="bold")
    return figure


class _Parser(ArgumentParser):
    """A parser that reads files of arguments as a shell reads its lines."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m tools.figures.plot",
        description="Draw rate-distortion curves and print BD-rates of result JSON files. A curve "
        "is the path of a file, the name of one in results/published, or several paths with commas "
        "between them, which are joined. @FILE stands for the arguments in that file.",
        fromfile_prefix_chars="@",
    )
    parser.add_argument("curves", nargs="*", default=list(DEFAULT_CURVES), metavar="CURVE")
    parser.add_argument(
        "--ours",
        nargs="+",
        default=["mambavc"],
        metavar="CURVE",
        help="drawn in the accent colour (default: %(default)s)",
    )
    parser.add_argument("--anchor", default="vtm", metavar="CURVE", help="of the BD-rates")
    parser.add_argument(
        "--panels",
        nargs="+",
        choices=PANELS,
        default=["psnr", "ms-ssim"],
        help="what to draw, from left to right (default: psnr ms-ssim)",
    )
    everything = Limits()
    parser.add_argument(
        "--bpp", nargs=2, type=float, default=everything.bpp, metavar=("LOW", "HIGH"),
        help="rates to show (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--saved", nargs=2, type=float, default=everything.saved, metavar=("LOW", "HIGH"),
        help="savings to show, in percent (default: all)",
    )  # fmt: skip
    parser.add_argument("--method", choices=("pchip", "akima"), default="pchip")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture (.png, .svg, .pdf)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output is not None:
        style.check_output(args.output)
    anchor = load_curve(args.anchor)
    others = [load_curve(source) for source in args.curves if source != args.anchor]
    ours = [load_curve(source) for source in args.ours]
    print(bd_table(anchor, [*ours, *others], args.method))
    if args.output is not None:
        limits = Limits(tuple(args.bpp), tuple(args.saved))
        figure = draw(ours, others, anchor, args.panels, limits=limits, title=args.title)
        style.save(figure, args.output)


if __name__ == "__main__":
    run_main(main)
