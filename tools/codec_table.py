"""Write the table of all published codecs into a Markdown file, from the data in results/published.

::

    python -m tools.codec_table results/README.md --ours results/mambavc-light-*kodak.json
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import utils
from tools.figures.plot import PUBLISHED, Curve, bd_rate, compared_over, load_curve
from utils import UsageError

ANCHOR = "vtm"  # the file of that name in each folder
OTHER_SETS = {"tecnick": "Tecnick", "clic": "CLIC"}  # folders in PUBLISHED
HEAD = (
    "codec", "Kodak, PSNR", "over", "Kodak, MS-SSIM", *OTHER_SETS.values(), "parameters, M",
    "kMACs a pixel", "encode / decode, ms",
)  # fmt: skip
START, END = "<!-- tools.codec_table -->\n", "<!-- end of tools.codec_table -->\n"


def _percent(rate: float) -> str:
    return "" if math.isnan(rate) else f"{rate:+.1f}"


def _row(path: Path, anchors: dict[str, Curve]) -> tuple[float, list[str]]:
    """BD-rate by PSNR on Kodak of a file's codec, and the cells of its line."""
    curve, content = load_curve(str(path)), json.loads(path.read_text())
    kodak = anchors["."]
    cells = [curve.name]
    cells += [_percent(bd_rate(kodak, curve)), compared_over(kodak, curve)]
    cells += [_percent(bd_rate(kodak, curve, "ms-ssim"))]
    for folder in OTHER_SETS:
        same = PUBLISHED / folder / path.name
        known = path.parent == PUBLISHED and same.is_file()
        cells.append(_percent(bd_rate(anchors[folder], load_curve(str(same)))) if known else "")
    cost = content.get("cost", {})
    for key, unit, digits in (("parameters", 1e6, 1), ("macs_per_pixel", 1e3, 0)):
        cells.append(f"{cost[key] / unit:,.{digits}f}" if key in cost else "")
    results = {key: values[0] for key, values in content["results"].items()}
    times = [{**results, **cost}.get(key) for key in ("encoding_time", "decoding_time")]
    shown = " / ".join(f"{1000 * seconds:.0f}" for seconds in times if seconds)
    cells.append(f"{shown}, {cost['machine']}" if shown and "machine" in cost else "")
    return bd_rate(kodak, curve), cells


def table(ours: Sequence[Path] = ()) -> str:
    """BD-rates and costs of all published codecs and of ours, as Markdown, best first.

    BD-rates are in percent of the rate of VTM 9.1 on the same pictures, over the interval of
    quality that both curves cover. What the data do not hold is empty.
    """
    anchors = {folder: load_curve(f"{folder}/{ANCHOR}") for folder in (".", *OTHER_SETS)}
    rows = [_row(path, anchors) for path in [*sorted(PUBLISHED.glob("*.json")), *ours]]
    rows.sort(key=lambda row: row[0])
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(cells for _, cells in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    what = __doc__.partition("::")[0]
    parser = utils.ArgumentParser(prog="python -m tools.codec_table", description=what)
    parser.add_argument("file", type=Path, help=f"has {START.strip()} and {END.strip()}")
    parser.add_argument(
        "--ours", nargs="*", type=Path, default=[], metavar="FILE", help="of eval.py --json"
    )
    args = parser.parse_args(argv)
    try:
        before, rest = args.file.read_text().split(START)
        _, after = rest.split(END)
    except (OSError, ValueError):
        raise UsageError(
            f"{args.file} is not a text with the lines {START.strip()} and {END.strip()}, once each"
        ) from None
    text = f"{before}{START}\n{table(args.ours)}\n{END}{after}"
    with utils.atomic_write(args.file) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    utils.run_main(main)
