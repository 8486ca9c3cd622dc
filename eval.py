"""Evaluate a checkpoint on a folder of pictures, by default with real bitstreams."""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import utils
from models import Coder
from models import checkpoint as checkpoint_file
from models.coding import MAX_GRAPHED_SIZES
from utils import UsageError

logger = logging.getLogger("mambavc")

MAX_PSNR_GAP = 0.01  # dB between the decoded stream and the estimate's reconstruction
MAX_RATE_EXCESS = 0.02  # of real over estimated rate, before it is worth a warning


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="file that train.py saved, or the name of a shipped one"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of pictures, or one that has them in test/"
    )
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results to this file")
    parser.add_argument(
        "--save-images", type=Path, metavar="DIR", help="write reconstructions to this folder"
    )
    args = parser.parse_args(argv)
    if args.cuda_graph and (not args.cuda or args.estimate):
        parser.error("--cuda-graph needs --cuda and replays coding, of which --estimate does none")
    return args


@torch.inference_mode()
def evaluate_image(coder: Coder, x: Tensor, estimate: bool) -> tuple[dict, Tensor]:
    """Measure one picture (1, 3, height, width); return its row and the reconstruction.

    The row's keys are those of the results JSON; see `README.md` for the conventions.

    Raises:
        DataError: the decoded stream and the estimate reconstruct different pictures.
    """
    height, width = x.shape[-2:]
    start = utils.clock(x.device)
    output = coder.model(x)
    forward_time = utils.clock(x.device) - start
    estimated_bpp = utils.estimated_bpp(output["likelihoods"], height * width)
    x_hat = output["x_hat"].clamp(0, 1)
    row = {"width": width, "height": height, "estimated-bpp": estimated_bpp}
    if estimate:
        row |= {"bpp": estimated_bpp, "forward_time": forward_time}
    else:
        start = utils.clock(x.device)
        stream = coder.encode(x)
        encoded = utils.clock(x.device)
        x_hat_real = coder.decode(stream)
        decoded = utils.clock(x.device)
        gap = 0.0
        if not torch.equal(utils.to_uint8(x_hat_real), utils.to_uint8(x_hat)):
            gap = utils.psnr(x_hat_real, x) - utils.psnr(x_hat, x)
        if not abs(gap) <= MAX_PSNR_GAP:
            raise utils.DataError(
                f"the decoded stream's PSNR is {gap:+.3f} dB off the estimate's "
                f"(at most {MAX_PSNR_GAP} dB expected); the stream does not decode to what was "
                "encoded: do not trust this checkpoint's results"
            )
        x_hat = x_hat_real
        row |= {
            "bpp": 8 * len(stream) / (height * width),
            "encode_time": encoded - start,
            "decode_time": decoded - encoded,
        }
    row["psnr-rgb"] = utils.psnr(x_hat, x)
    row["ms-ssim-rgb"] = utils.ms_ssim(x_hat, x)
    return row, x_hat


def summarise(rows: Sequence[dict]) -> dict[str, float]:
    """Mean of each measured quantity over the pictures that have it."""
    keys = [key for key in rows[0] if key not in ("name", "width", "height")]
    values = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    return {key: utils.mean(column) for key, column in values.items() if column}


def print_table(rows: Sequence[dict], means: dict[str, float]) -> None:
    times = [key for key in ("encode_time", "decode_time", "forward_time") if key in rows[0]]
    header = f"{'picture':<24} {'bpp':>8} {'estimated':>9} {'PSNR dB':>8} {'MS-SSIM':>8} {'dB':>6}"
    print(header + "".join(f" {key.replace('_time', ' s'):>9}" for key in times))
    for row in [*rows, {"name": "mean", **means}]:
        similarity = row.get("ms-ssim-rgb")
        cells = f"{similarity:8.5f} {utils.ms_ssim_db(similarity):6.2f}" if similarity else ""
        print(
            f"{row['name']:<24.24} {row['bpp']:8.4f} {row['estimated-bpp']:9.4f} "
            f"{row['psnr-rgb']:8.3f} {cells:<15}" + "".join(f" {row[key]:9.3f}" for key in times)
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging()
    device = utils.select_device(args.cuda)
    folder = args.data / "test" if (args.data / "test").is_dir() else args.data
    files = utils.list_images(folder)
    if args.json:
        utils.check_output(args.json)
    if args.save_images:
        same = [name for name, n in Counter(f.stem for f in files).items() if n > 1]
        if same:
            raise UsageError(
                f"--save-images names pictures by their files without endings, and {folder} has "
                f"several of {', '.join(same[:5])}; rename them"
            )
        utils.make_folder(args.save_images)
    model = checkpoint_file.load_model(args.checkpoint, device)
    coder = Coder(model, exact=not args.fast_entropy, graphs=args.cuda_graph)

    rows = []
    warm: set[torch.Size] = set()
    for file in tqdm(files, desc="eval", unit="picture", disable=None, leave=False):
        x = utils.to_tensor(utils.read_image(file))[None].to(device)
        try:
            # Compilation, caches and, for each size, the capture of graphs stay out of the times.
            if not warm or (args.cuda_graph and x.shape not in warm):
                if len(warm) == MAX_GRAPHED_SIZES:
                    warm.clear()
                for _ in range(2 if args.cuda_graph else 1):
                    evaluate_image(coder, x, args.estimate)
                warm.add(x.shape)
            row, x_hat = evaluate_image(coder, x, args.estimate)
        except utils.DataError as error:
            raise utils.DataError(f"{file}: {error}") from None
        rows.append({"name": file.name, **row})
        if args.save_images:
            with utils.atomic_write(args.save_images / f"{file.stem}.png") as path:
                utils.to_image(x_hat[0]).save(path, format="PNG")

    means = summarise(rows)
    print_table(rows, means)
    small = [row["name"] for row in rows if row["ms-ssim-rgb"] is None]
    if small:
        print(
            f"MS-SSIM needs sides of at least {utils.MS_SSIM_MIN_SIDE} pixels; "
            f"skipped for {len(small)} of {len(rows)}: {', '.join(small[:5])}"
        )
    excess = means["bpp"] / means["estimated-bpp"] - 1
    if excess > MAX_RATE_EXCESS:
        print(
            f"warning: real bpp is {excess:.1%} above the estimate; likely causes: quantiles of "
            "the entropy bottleneck that have not converged when the CDF tables were built, or "
            "pictures so small that the stream's header weighs"
        )
    if args.json:
        results = {
            "name": Path(args.checkpoint).name,
            "description": f"{args.checkpoint} on {folder}, {len(rows)} pictures, "
            + ("estimated rates" if args.estimate else "real bitstreams")
            + f", {torch.cuda.get_device_name(device) if args.cuda else 'CPU'}",
            "results": {key: [value] for key, value in means.items()},
            "images": rows,
        }
        with utils.atomic_write(args.json) as path:
            path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    utils.run_main(main)
