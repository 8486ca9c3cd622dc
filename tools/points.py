"""Print the rate-distortion points of files that eval.py wrote, one below the other."""

import json
from collections.abc import Sequence
from pathlib import Path

import utils
from utils import ArgumentParser, UsageError, ms_ssim_db

KEYS = ("bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time")
UNITS = ("bpp", "PSNR dB", "MS-SSIM dB", "encode s", "decode s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tools.points", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files of eval.py --json")
    args = parser.parse_args(argv)
    print(f"{'file':<24}" + "".join(f"{unit:>12}" for unit in UNITS))
    for path in args.files:
        try:
            results = json.loads(path.read_text())["results"]
            points = range(len(results["bpp"]))
            rows = [[results[k][i] if k in results else None for k in KEYS] for i in points]
            names = [f"{path.stem} at {q:g}" for q in results.get("quality", [])]
            lines = [*zip(names or [path.stem] * len(rows), rows, strict=True)]
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            message = f"{path} is not a file that eval.py --json wrote ({error!r})"
            raise UsageError(message) from None
        for name, values in lines:
            if values[2] is not None:
                values[2] = ms_ssim_db(values[2])
            cells = ("" if value is None else f"{value:.3f}" for value in values)
            print(f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    utils.run_main(main)
