"""Evaluate checkpoints on folders of pictures, by default with real bitstreams."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import utils
from models import container
from models.checkpoint import check_backend, check_rate, find_checkpoint
from models.memory import check_memory, keep_freed_memory
from utils import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models import Coder

# In dB between the decoded stream and the estimate's reconstruction. Where both come from float32,
# and where latents are made in fewer bits: bfloat16, or on a GPU TF32 in convolutions. Those that
# differ a little are then rounded to neighbours, which good pictures and coarse steps show.
MAX_PSNR_GAP, MAX_ROUNDED_PSNR_GAP = 0.01, 0.05
MAX_RATE_EXCESS = 0.02  # of real over estimated rate, before it is worth a warning
TIMES = {"encoding_time": "encode s", "decoding_time": "decode s", "forward_time": "forward s"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        help="file that train.py saved, or the name of a shipped one; several, such as one for "
        "each rate, make one curve",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        help="folder of pictures, or one that has them in test/",
    )
    parser.add_argument(
        "--qualities",
        type=utils.quality,
        nargs="+",
        metavar="Q",
        help="of a network of every rate, 0 to 100 in hundredths: measure a curve",
    )
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    utils.add_precision(parser)
    parser.add_argument(
        "--estimate", action="store_true", help="estimate rates from likelihoods, code nothing"
    )
    parser.add_argument(
        "--fast-entropy",
        action="store_true",
        help="float32 entropy path: streams decode on the same machine only",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="code pictures of a size seen before from CUDA graphs: the GPU need not wait for its "
        "host; needs --cuda",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write results to this file; of several folders, to files of their names in this "
        "folder",
    )
    parser.add_argument(
        "--save-images", type=Path, metavar="DIR", help="write reconstructions to this folder"
    )
    args = parser.parse_args(argv)
    if args.cuda_graph and (not args.cuda or args.estimate):
        parser.error("--cuda-graph needs --cuda and replays coding, of which --estimate does none")
    if args.save_images and len(args.checkpoint) * len(args.data) > 1:
        parser.error("--save-images writes the pictures of one checkpoint and one folder")
    if args.qualities:
        args.qualities = sorted({container.coded_quality(quality) for quality in args.qualities})
        if args.save_images and len(args.qualities) > 1:
            parser.error("--save-images writes the pictures of one quality; give one")
    return args


def evaluate_image(
    coder: Coder, x: Tensor, estimate: bool, quality: float | None = None
) -> tuple[dict, Tensor]:
    """Measure one picture (1, 3, height, width); return its row and the reconstruction.

    The row's keys are those of the results JSON; see `results/README.md` for the conventions. They
    are CompressAI's where it has one.

    Raises:
        DataError: the network's output is not finite, or the decoded stream and the estimate
            reconstruct different pictures.
    """
    import torch

    height, width = x.shape[-2:]
    start = utils.clock(x.device)
    with torch.inference_mode():
        output = coder.model(x, quality, precision=coder.precision)
    forward_time = utils.clock(x.device) - start
    estimated_bpp = utils.estimated_bpp(output["likelihoods"], height * width)
    if not math.isfinite(estimated_bpp):
        raise DataError("the network's estimate of the rate is not finite; check its weights")
    x_hat = output["x_hat"]  # not clamped: its infinities would look white
    estimated_psnr = utils.psnr(x_hat, x)
    row = {"width": width, "height": height}
    if quality is not None:
        row["quality"] = quality
    row["estimated-bpp"] = estimated_bpp
    if estimate:
        row |= {"bpp": estimated_bpp, "forward_time": forward_time}
    else:
        start = utils.clock(x.device)
        stream = coder.encode(x, quality)
        encoded = utils.clock(x.device)
        decoded_x_hat = coder.decode(stream)
        decoded = utils.clock(x.device)
        gap = 0.0
        if not torch.equal(utils.to_uint8(decoded_x_hat), utils.to_uint8(x_hat)):
            gap = utils.psnr(decoded_x_hat, x) - estimated_psnr
        is_rounded = x.is_cuda or coder.precision != torch.float32
        max_gap = MAX_ROUNDED_PSNR_GAP if is_rounded else MAX_PSNR_GAP
        if not abs(gap) <= max_gap:
            raise DataError(
                f"the decoded stream's PSNR is {gap:+.3f} dB off the estimate's "
                f"(at most {max_gap} dB expected); the stream does not decode to what was "
                "encoded: do not trust this checkpoint's results"
            )
        x_hat = decoded_x_hat
        row |= {
            "bpp": 8 * len(stream) / (height * width),
            "encoding_time": encoded - start,
            "decoding_time": decoded - encoded,
        }
    row["psnr-rgb"] = utils.psnr(x_hat, x)
    row["ms-ssim-rgb"] = utils.ms_ssim(x_hat, x)
    return row, x_hat


def name_of(precision: torch.dtype) -> str:
    """As the flag names it."""
    return str(precision).removeprefix("torch.")


def evaluate(
    coder: Coder, files: Iterable[Path], device: torch.device, args: argparse.Namespace
) -> tuple[list[dict], list[str]]:
    """Rows of the pictures (see `evaluate_image`), of each at all qualities one after another, and
    the names of files that cannot be read.

    Raises:
        DataError: the network fails on a picture, or no file can be read.
    """
    rows: list[dict] = []
    problems: dict[str, str] = {}

    def check_size(height: int, width: int) -> None:
        container.check_size(height, width)
        check_memory(coder.model, height, width)

    for file in files:
        try:
            image = utils.read_image(file, check_size=check_size, report=note)
        except DataError as error:
            problems[file.name] = str(error)
            note(f"skipped: {error}")
            continue
        x = utils.to_tensor(image)[None].to(device)
        # Compilation, caches and, for each size, the capture of graphs stay out of the times.
        calls = 1 if rows else 2
        if args.cuda_graph and not coder.has_graphs(x):
            calls = 3
        with utils.data_errors(file):
            for quality in args.qualities or [None]:
                for _ in range(calls):
                    row, x_hat = evaluate_image(coder, x, args.estimate, quality)
                calls = 1
                rows.append({"name": file.name, **row})
        if args.save_images:
            with utils.atomic_write(args.save_images / f"{file.stem}.png") as path:
                utils.to_image(x_hat[0]).save(path, format="PNG")
    if not rows:
        first = next(iter(problems.values()))
        raise DataError(f"none of the {len(problems)} pictures can be read; the first: {first}")
    return rows, [*problems]


def note(line: str) -> None:
    utils.say(line, sys.stderr)


def summarise(rows: Sequence[dict]) -> dict[str, float]:
    """Mean of each measured quantity over the pictures that have it."""
    keys = [key for key in rows[0] if key not in ("name", "width", "height", "quality")]
    values = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    return {key: fmean(column) for key, column in values.items() if column}


def print_table(rows: Sequence[dict], means: dict[str, float]) -> None:
    times = [key for key in TIMES if key in rows[0]]
    header = f"{'picture':<24} {'bpp':>8} {'estimated':>9} {'PSNR dB':>8} {'MS-SSIM':>8} {'dB':>6}"
    print(header + "".join(f" {TIMES[key]:>9}" for key in times))
    for row in [*rows, {"name": "mean", **means}]:
        similarity = row.get("ms-ssim-rgb")
        cells = f"{similarity:8.5f} {utils.ms_ssim_db(similarity):6.2f}" if similarity else ""
        print(
            f"{row['name']:<24.24} {row['bpp']:8.4f} {row['estimated-bpp']:9.4f} "
            f"{row['psnr-rgb']:8.3f} {cells:<15}" + "".join(f" {row[key]:9.3f}" for key in times)
        )


def not_rising(points: Sequence[Sequence[dict]]) -> list[str]:
    """Pictures of which a higher quality takes no more bits, or is no better."""
    names = []
    for rows in zip(*points, strict=True):  # of one picture
        values = [(row["bpp"], row["psnr-rgb"]) for row in rows]
        pairs = itertools.pairwise(values)
        if not all(low < high for pair in pairs for low, high in zip(*pair, strict=True)):
            names.append(rows[0]["name"])
    return names


def print_warnings(
    points: Sequence[Sequence[dict]], means: Sequence[dict[str, float]], skipped: Sequence[str]
) -> None:
    """What a reader of the tables should know about their numbers.

    Args:
        points: rows of the pictures, in one order, at each quality.
        means: of each quality.
    """
    rows = points[0]
    small = [row["name"] for row in rows if row["ms-ssim-rgb"] is None]
    if small:
        print(
            f"MS-SSIM needs sides of at least {utils.MS_SSIM_MIN_SIDE} pixels; "
            f"skipped for {len(small)} of {len(rows)}: {', '.join(small[:5])}"
        )
    if skipped:
        print(
            f"warning: {len(skipped)} of {len(rows) + len(skipped)} files could not be read and "
            f"are not part of the means: {', '.join(skipped[:5])}"
        )
    falling = not_rising(points)
    if falling:
        print(
            f"warning: bits or PSNR do not rise with the quality on {len(falling)} of {len(rows)} "
            f"pictures: {', '.join(falling[:5])}"
        )
    excess = max(mean["bpp"] / mean["estimated-bpp"] - 1 for mean in means)
    if excess > MAX_RATE_EXCESS:
        print(
            f"warning: real bpp is {excess:.1%} above the estimate; likely causes: quantiles of "
            "the entropy bottleneck that have not converged when the CDF tables were built, or "
            "pictures so small that the stream's header weighs"
        )


def check_reconstructions(files: Sequence[Path], folder: Path) -> None:
    """Make sure that each picture's reconstruction can be written to this folder, over none.

    Raises:
        UsageError: it cannot.
    """
    same = [name for name, n in Counter(f.stem for f in files).items() if n > 1]
    if same:
        raise UsageError(
            f"--save-images names pictures by their files without endings, and {files[0].parent} "
            f"has several of {', '.join(same[:5])}; rename them"
        )
    utils.make_folder(folder)
    targets = [folder / f"{file.stem}.png" for file in files]
    for target in targets:
        utils.check_output(target)
    existing = [target.stat() for target in targets if target.exists()]
    originals = [file.stat() for file in files]
    overwrites = any(os.path.samestat(a, b) for a in existing for b in originals)
    if overwrites or folder.samefile(files[0].parent):
        raise UsageError(
            f"--save-images {folder} would write over the pictures that are evaluated, or among "
            "them; give another folder"
        )


def without_infinity(row: dict) -> dict:
    """JSON knows no infinity, the PSNR of identical pictures: there it is null."""
    return {key: None if value == math.inf else value for key, value in row.items()}


@dataclass
class Run:
    """What a checkpoint achieves on a folder.

    Attributes:
        points: of a curve, one for each quality: rows of the pictures (see `evaluate_image`).
        skipped: names of files that could not be read.
    """

    checkpoint: str
    points: list[list[dict]]
    skipped: list[str]

    @property
    def means(self) -> list[dict[str, float]]:
        return [summarise(rows) for rows in self.points]


def as_curve(runs: Sequence[Run], folder: Path, how: str, precision: torch.dtype) -> dict:
    """The runs of several checkpoints on a folder as one curve, in CompressAI's format."""
    means = [without_infinity(mean) for run in runs for mean in run.means]
    qualities = [rows[0]["quality"] for run in runs for rows in run.points if "quality" in rows[0]]
    names = [run.checkpoint for run in runs]
    images = []
    for run in runs:
        of_several = {"checkpoint": run.checkpoint} if len(runs) > 1 else {}
        # Of each picture all qualities, as they were measured.
        rows = itertools.chain.from_iterable(zip(*run.points, strict=True))
        images += [of_several | without_infinity(row) for row in rows]
    return {
        "name": _curve_name(Path(names[0])),
        "description": f"{', '.join(names)} on {folder}, {len(runs[0].points[0])} pictures, {how}",
        "results": ({"quality": qualities} if qualities else {})
        | {key: [mean.get(key) for mean in means] for key in means[0]},
        "images": images,
        "skipped": runs[0].skipped,
        "config": {"precision": name_of(precision)},
    }


def _curve_name(checkpoint: Path) -> str:
    """What a checkpoint is called; a run's, all of which have the same names, after its folders."""
    if checkpoint.name.startswith("checkpoint_"):
        return "/".join(checkpoint.resolve().parts[-3:-1])
    return checkpoint.name


def list_data(folders: Sequence[Path], file: Path | None) -> dict[Path, tuple[list[Path], Path]]:
    """The pictures of each folder, and where its curve is written: to `file`, or into it.

    Raises:
        UsageError: there are none, or files cannot be written there.
    """
    found = {}
    for data in folders:
        folder = data / "test" if (data / "test").is_dir() else data
        files, target = utils.list_images(folder), file
        if file is not None and len(folders) > 1:
            utils.make_folder(file)
            target = file / f"{data.resolve().name}.json"
        if target is not None:
            if target in [other for _, other in found.values()]:
                raise UsageError(f"two folders of --data would be written to {target}; rename one")
            utils.check_output(target)
        found[folder] = files, target
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    data = list_data(args.data, args.json)
    if args.save_images:
        ((files, _),) = data.values()
        check_reconstructions(files, args.save_images)
    checkpoints = {name: find_checkpoint(name) for name in args.checkpoint}

    # Until here nothing needed PyTorch, which takes seconds to import.
    import torch

    from models import Coder, load_model

    keep_freed_memory()
    device = utils.select_device(args.cuda)
    check_backend(device)
    how = "estimated rates" if args.estimate else "real bitstreams"
    how += f", {torch.cuda.get_device_name(device) if args.cuda else 'CPU'}"
    precision = utils.chosen_precision(args.precision, device)
    for name, checkpoint in checkpoints.items() if len(checkpoints) > 1 else ():
        # Before hours are spent on the first of them.
        check_rate(load_model(checkpoint), args.qualities is not None, name, "--qualities")
    runs: dict[Path, list[Run]] = {folder: [] for folder in data}
    num_runs = len(checkpoints) * len(data)
    for name, checkpoint in checkpoints.items():
        model = load_model(checkpoint, device)
        coder = Coder(
            model, exact=not args.fast_entropy, graphs=args.cuda_graph, precision=precision
        )
        check_rate(model, args.qualities is not None, name, "--qualities")
        for folder, (files, target) in data.items():
            number = sum(map(len, runs.values())) + 1
            which = f"run {number} of {num_runs}" if num_runs > 1 else None
            shown = utils.progress(files, len(files), "picture", which, lambda file: file.name)
            with shown as tracked:
                rows, skipped = evaluate(coder, tracked, device, args)
            # One point of the curve for each quality; a network of a single rate has one.
            points = [
                [row for row in rows if row.get("quality") == quality]
                for quality in args.qualities or [None]
            ]
            run = Run(name, points, skipped)
            runs[folder].append(run)
            if target:  # before anything is printed: whoever reads that may leave
                curve = as_curve(runs[folder], folder, how, precision)
                with utils.atomic_write(target) as path:
                    path.write_text(json.dumps(curve, indent=2, allow_nan=False) + "\n")
            if num_runs > 1:
                print(f"{name} on {folder}")
            for point, mean in zip(points, run.means, strict=True):
                if args.qualities:
                    quality = point[0]["quality"]
                    print(f"quality {quality:g}, lambda {model.lmbda(quality):.4f}")
                print_table(point, mean)
            print_warnings(points, run.means, skipped)


if __name__ == "__main__":
    utils.run_main(main)
