"""BD-rates against published values, the figures, and what the scripts refuse."""

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHALLOW, gained_model, save_checkpoint, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

import models
from models.checkpoint import load_model
from tools.figures import architecture, plot, receptive_field, scaling, speed, style, visual
from tools.figures.plot import PUBLISHED, Curve, bd_rate, load_curve
from utils import UsageError, psnr, to_tensor

ROOT = Path(plot.__file__).parents[2]


def curve(bpp, psnr, name="c"):
    return Curve(name, np.array(bpp, float), {"psnr": np.array(psnr, float)})


def write_result(path, bpp, **columns):
    results = {"bpp": bpp, "psnr-rgb": [30 + 5 * b for b in bpp], **columns}
    path.write_text(json.dumps({"name": path.stem, "description": "", "results": results}))
    return str(path)


def drawn_line(line):
    return list(zip(*line.get_data(), strict=True))


def drawn(axes):
    """The points of the last line of each colour: (x, y) pairs."""
    return {line.get_color(): drawn_line(line) for line in axes.lines}


def picture_size(path):
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10, "the picture is empty"
        return image.size


# BD-rates


@pytest.mark.parametrize(
    ("name", "percent"),
    [("tcm-large", -11.73), ("elic", -7.02), ("mambavc", -9.68)],
)
def test_bd_rates_are_the_published_ones(name, percent):
    """Anchor VTM, PCHIP; -11.73 % and -7.02 % are what others report for these points."""
    assert bd_rate(load_curve("vtm"), load_curve(name)) == pytest.approx(percent, abs=0.005)


def test_akima_agrees_with_pchip():
    """Both interpolate the same points; on smooth curves they differ by little."""
    vtm, tcm = load_curve("vtm"), load_curve("tcm-large")
    assert bd_rate(vtm, tcm, method="akima") == pytest.approx(bd_rate(vtm, tcm), abs=0.1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_bd_rate_of_a_scaled_curve_is_the_scale(factor):
    anchor = curve([0.1, 0.2, 0.4, 0.8], [28, 31, 34, 37])
    scaled = curve(anchor.bpp * factor, anchor.quality["psnr"])
    assert bd_rate(anchor, scaled) == pytest.approx(100 * (factor - 1), abs=1e-6)


def test_one_point_is_compared_at_its_quality():
    anchor = load_curve("vtm")
    bpp, psnr = anchor.bpp[2], anchor.quality["psnr"][2]
    assert bd_rate(anchor, curve([1.5 * bpp], [psnr])) == pytest.approx(50)
    table = plot.bd_table(anchor, [curve([1.5 * bpp], [psnr])])
    assert f"| c | +50.00 % | at {psnr:.2f} dB |" in table
    touching = curve([0.1, 0.2], [anchor.quality["psnr"][-1], 60])
    assert "| c |  | no overlap |  |" in plot.bd_table(anchor, [touching])


def test_bd_rate_that_does_not_exist_is_nan():
    anchor = curve([0.1, 0.2], [28, 31])
    assert math.isnan(bd_rate(anchor, curve([0.1, 0.2], [40, 42])))
    assert math.isnan(bd_rate(anchor, curve([0.1, 0.2], [31, 32])))
    assert math.isnan(bd_rate(anchor, curve([0.1], [27])))
    assert math.isnan(bd_rate(curve([0.1], [29]), anchor))
    assert math.isnan(bd_rate(anchor, curve([0.1, 0.2], [30, 29])))
    assert math.isnan(bd_rate(anchor, anchor, metric="ms-ssim"))


def test_table_lists_every_curve_best_first(capsys):
    plot.main(["bpg", "elic", "--ours", "mambavc"])
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split(" | ")[0] for row in rows] == ["| MambaVC (paper)", "| ELIC", "| BPG 4:4:4"]
    assert rows[1] == "| ELIC | -7.02 % | 29.1 to 37.6 dB |  |"


# Result files


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_published_points_rise_and_name_their_source(path):
    data = json.loads(path.read_text())
    assert data["source"] and data["uncertainty"]
    points = load_curve(path.stem)
    assert (np.diff(points.bpp) > 0).all()
    assert all((np.diff(values) > 0).all() for values in points.quality.values())


def test_files_of_one_rate_each_join_to_a_curve(tmp_path):
    low = write_result(tmp_path / "low.json", [0.2])
    high = write_result(tmp_path / "high.json", [0.4])
    joined = load_curve(f"{high},{low}")
    assert joined.name == "high"
    assert joined.bpp.tolist() == [0.2, 0.4]
    assert joined.quality["psnr"].tolist() == [31.0, 32.0]


def test_ms_ssim_is_compared_in_db(tmp_path):
    points = load_curve(
        write_result(tmp_path / "a.json", [0.2, 0.4], **{"ms-ssim-rgb": [0.9, 0.99]})
    )
    assert points.quality["ms-ssim"].tolist() == pytest.approx([10, 20])
    without = write_result(tmp_path / "b.json", [0.2, 0.4], **{"ms-ssim-rgb": [0.9, None]})
    assert "ms-ssim" not in load_curve(without).quality


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"name": "x", "results": {"bpp": [0.1], "psnr-rgb": [30, 31]}}',
     '{"name": "x", "results": {"bpp": [0], "psnr-rgb": [30]}}',
     '{"name": "x", "results": {"bpp": [], "psnr-rgb": []}}',
     '{"name": "x", "results": {"bpp": ["a"], "psnr-rgb": [30]}}'],
)  # fmt: skip
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"x\.json does not hold"):
        load_curve(str(path))


def test_files_of_compressai_are_compared_as_they_are(tmp_path, capsys):
    """JPEG by compressai.utils.bench and ours by compressai.utils.eval_model, on demo/test."""
    jpeg, ours, hyperprior, picture = (
        str(Path(__file__).parent / "assets" / "compressai" / f"{name}.json")
        for name in ("bench-jpeg", "eval_model-mambavc-light", "eval_model-hyperprior",
                     "eval_model-per-image")
    )  # fmt: skip
    assert (len(load_curve(jpeg).bpp), len(load_curve(hyperprior).bpp)) == (3, 2)
    assert load_curve(picture).bpp.tolist() == [pytest.approx(0.543, abs=5e-4)]
    output = tmp_path / "rd.png"
    plot.main(
        [hyperprior, "--ours", ours, "--anchor", jpeg, "--bpp", "0.01", "2.5", "--output",
         str(output)]
    )  # fmt: skip
    assert picture_size(output) == (2080, 800)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    # At 35.15 dB, ours takes 0.278 bpp; JPEG 0.747 by a straight line between its points, from
    # which PCHIP differs by 0.3 %.
    name, percent = first.strip("| ").split(" | ")[:2]
    assert name == "mambavc-light-mse"
    assert float(percent.removesuffix(" %")) == pytest.approx(100 * (0.278 / 0.747 - 1), abs=0.2)
    assert second == "| bmshj2018-hyperprior-mse |  | no overlap |  |"


def test_an_unknown_curve_is_refused_with_the_known_names():
    with pytest.raises(UsageError, match="tcm-large"):
        load_curve("vvc")


# Figures


def named(figure_axes):
    return {text.get_text(): text.get_color() for text in figure_axes.texts}


OURS = Curve(
    "ours",
    np.array([0.3, 0.6]),
    {"psnr": np.array([34.0, 37.0]), "ms-ssim": np.array([15.0, 19.0])},
)
ONE_POINT = Curve("ours", OURS.bpp[:1], {k: v[:1] for k, v in OURS.quality.items()})


@pytest.mark.parametrize("ours", [OURS, ONE_POINT], ids=["curve", "point"])
@pytest.mark.parametrize("metric", ["psnr", "ms-ssim"])
def test_quality_is_drawn_over_rate(metric, ours):
    figure = plot.draw([ours], [load_curve("bpg")], load_curve("vtm"), [metric])
    (axes,) = figure.axes
    assert drawn(axes)[style.ACCENT] == list(zip(ours.bpp, ours.quality[metric], strict=True))
    assert named(axes)["ours"] == style.ACCENT
    assert {"BPG 4:4:4", "VTM 9.1"} <= named(axes).keys()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rate [bit per pixel]", plot.QUALITY[metric])


def test_savings_are_relative_to_the_anchor():
    anchor = load_curve("vtm")
    half = Curve("ours", anchor.bpp / 2, anchor.quality)
    (axes,) = plot.draw([half], [], anchor, ["saving"]).axes
    shown = [
        value
        for bpp, value in zip(half.bpp, anchor.quality["psnr"], strict=True)
        if 0.08 <= bpp <= 0.95
    ]
    points = drawn(axes)[style.ACCENT]
    assert [x for x, _ in points] == pytest.approx(shown)
    assert [y for _, y in points] == pytest.approx([50] * len(shown))
    assert {y for _, y in drawn(axes)[style.MUTED]} == {0}


def test_the_command_draws_what_was_asked_for(tmp_path):
    ours, output = write_result(tmp_path / "ours.json", [0.3, 0.6]), tmp_path / "rd.png"
    plot.main(["elic", "--ours", ours, "--panels", "psnr", "saving", "--output", str(output)])
    assert picture_size(output) == (2080, 800)


@pytest.mark.parametrize(("name", "counts"), [("rd_kodak", [11, 11]), ("rd_kodak_rest", [28, 13])])
def test_names_of_the_kept_figures_do_not_overlap(name, counts):
    """Ten published curves and our point; the others, of which not all have all that is shown."""
    args = plot.parse_args([f"@{ROOT / 'results' / name}.args"])
    curves = [[load_curve(source) for source in group] for group in (args.ours, args.curves)]
    limits = plot.Limits(args.bpp, args.saved)
    figure = plot.draw(*curves, load_curve(args.anchor), args.panels, limits=limits)
    FigureCanvasAgg(figure).draw()
    for axes, count in zip(figure.axes, counts, strict=True):
        # Of the names alone, without the lines that lead to them.
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) == count
        assert not [pair for pair in itertools.combinations(boxes, 2) if Bbox.overlaps(*pair)]
        for box in boxes:
            assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)


def test_the_two_figures_show_every_published_curve_of_kodak():
    shown = []
    for name in ("rd_kodak", "rd_kodak_rest"):
        args = plot.parse_args([f"@{ROOT / 'results' / name}.args"])
        shown += args.curves
    assert sorted([*shown, "mambavc", "vtm"]) == sorted(p.stem for p in PUBLISHED.glob("*.json"))


def test_savings_outside_the_limits_are_not_drawn():
    anchor = load_curve("vtm")
    half = Curve("half", anchor.bpp / 2, anchor.quality)
    twice = Curve("twice", anchor.bpp * 2, anchor.quality)
    limits = plot.Limits(saved=(-60, 60))
    (axes,) = plot.draw([], [half, twice], anchor, ["saving"], limits=limits).axes
    assert "half" in named(axes) and "twice" not in named(axes)
    assert axes.get_ylim()[0] > -60


def test_a_panel_without_data_is_refused(tmp_path):
    output = tmp_path / "rd.png"
    one = write_result(tmp_path / "one.json", [0.3])
    with pytest.raises(UsageError, match="panel saving"):
        plot.main(["elic", "--anchor", one, "--panels", "saving", "--output", str(output)])
    psnr_only = write_result(tmp_path / "psnr.json", [0.3, 0.6])
    with pytest.raises(UsageError, match="panel ms-ssim"):
        plot.main([psnr_only, "--ours", psnr_only, "--anchor", psnr_only, "--output", str(output)])
    assert not output.exists()


def test_a_failed_drawing_keeps_the_old_file(tmp_path, monkeypatch):
    output = tmp_path / "rd.png"
    output.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot.main(["elic", "--output", str(output)])
    assert output.read_bytes() == b"old"


def test_the_same_data_gives_the_same_file(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        architecture.main(["--output", str(file)])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert picture_size(files[0]) == (2300, 1520)


@given(
    st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.floats(0.01, 0.09), st.floats(0, 0.01)
)
def test_labels_stay_where_there_is_room(positions, gap, low):
    moved = style.spread(positions, gap, low, 1)
    assert low <= moved.min() and moved.max() <= 1 + 1e-9  # the rounding of sums of up to 2
    assert (np.diff(np.sort(moved)) >= gap - 1e-9).all()
    again = style.spread(moved, gap, low, 1)
    assert again == pytest.approx(moved, abs=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0.01, 3))
def test_labels_are_spread_in_order(positions, gap):
    moved = style.spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    steps = np.diff([moved[i] for i in order])
    assert (steps >= gap - 1e-9).all()  # the rounding of sums of up to 10 + 12 * 3
    wanted = np.diff(sorted(positions))
    if (wanted >= gap).all():
        assert moved == pytest.approx(positions, abs=1e-9)


def complexity_rows():
    part = {"parameters": 1, "macs": 10**9, "flops": 2 * 10**9}
    return [
        {
            "model": model, "height": height, "width": width, **part, "macs": height * width,
            "parts": dict.fromkeys(["g_a", "g_s", "h_a", "h_s", "context", "other"], part),
            "scan": part,
        }
        for model in ("mambavc", "convvc") for height, width in ((1024, 1024), (512, 768))
    ]  # fmt: skip


def variant(model, operation, height, width, **values):
    name = f"{operation} {height}x{width}"
    return {"group": "variants", "name": name, "backend": "cpu", "model": model, **values}


MACHINE = {"device": "a GPU", "torch": "2", "matmul_precision": "highest"}


def test_what_was_counted_and_measured_is_drawn(tmp_path):
    records = [
        variant(model, "forward", side, 1000, median_ms=factor * side, total_mib=1024 * factor)
        for model, factor in (("mambavc", 2), ("convvc", 1)) for side in (2000, 1000)
    ]  # fmt: skip
    records += [variant("mambavc", "step", 1000, 1000, error="out of memory")]
    records += [{**record, "group": "network"} for record in records]  # not of this figure
    figure = scaling.draw(complexity_rows(), {"machine": MACHINE, "records": records})
    bars, macs, memory, time = figure.axes
    assert [text.get_text() for text in bars.get_yticklabels()] == ["MambaVC", "CNN variant"]
    assert sorted(patch.get_width() for patch in bars.patches) == [1] * 6 + [2] * 2  # h_a and h_s
    sizes = [512 * 768, 1024 * 1024]
    assert drawn(macs)[style.ACCENT] == [(n / 1e6, pytest.approx(n / 1e12)) for n in sizes]
    assert (memory.get_title("left"), memory.get_ylabel()) == ("memory, inference", "peak [GiB]")
    assert drawn(memory)[style.ACCENT] == [(1, 2), (2, 2)]
    assert (time.get_title("left"), time.get_ylabel()) == ("forward pass", "seconds")
    assert drawn(time) == {style.ACCENT: [(1, 2), (2, 4)], style.OTHERS[0]: [(1, 1), (2, 2)]}
    assert named(time) == {"MambaVC": style.ACCENT, "CNN variant": style.OTHERS[0]}
    assert "a GPU, PyTorch's default flags" in figure.texts[0].get_text()


def test_counts_without_bars_are_refused():
    with pytest.raises(UsageError, match="512x768"):
        scaling.draw(complexity_rows()[::2], {"machine": MACHINE, "records": []})


def test_what_was_not_measured_gets_no_panel():
    content = {"machine": MACHINE, "records": []}
    assert len(scaling.draw(complexity_rows(), content).axes) == 2
    assert len(scaling.draw(complexity_rows()[1::2], content).axes) == 1, "one size makes no line"


def test_the_kept_measurements_fill_every_panel():
    """Of those at 4K, a training step fits into the GPU's memory for the CNN variant only."""
    rows = json.loads((ROOT / "results" / "complexity.json").read_text())["rows"]
    content = json.loads((ROOT / "results" / "variants-h200.json").read_text())
    figure = scaling.draw(rows, content)
    points = [[len(line.get_xdata()) for line in axes.lines] for axes in figure.axes[1:]]
    assert points == [[5, 5, 5], [5, 5, 5], [4, 5, 4], [5, 5, 5], [5, 5, 5], [5, 5, 5]]


def test_speed_has_a_panel_for_each_quantity(tmp_path):
    def record(backend, height, group="network", graph="", **values):
        name = f"forward {height}x768{graph}"
        return {"group": group, "name": name, "backend": backend, **values}

    records = [
        record(backend, height, median_ms=factor * height, peak_mib=height)
        for backend, factor in (("triton", 1), ("mamba_ssm", 3)) for height in (1024, 512)
    ]  # fmt: skip
    records += [record("triton", h, graph=" graph", median_ms=h) for h in (512, 1024)]
    records += [record("triton", h, "variants", median_ms=7 * h) for h in (512, 1024)]
    # As in older files, whose passes by backend were a group "scaling".
    records += [record("auto", height, median_ms=5 * height) for height in (512, 1024)]
    records += [record("published", h, "scaling", median_ms=9 * h) for h in (512, 1024)]
    records += [record("triton", 2048, error="out of memory")]
    records += [record("triton", h, median_ms=8 * h, model="another") for h in (512, 1024)]
    found = speed.lines(records, "median_ms")
    assert found["mamba-ssm's scan"] == [(512 * 768 / 1e6, 1536), (1024 * 768 / 1e6, 3072)]
    assert found.keys() == {"ours", "mamba-ssm's scan", "ours, CUDA graph", "published code"}
    assert len(speed.lines(records, "peak_mib")) == 2
    time, memory = speed.draw({"machine": MACHINE, "records": records}).axes
    assert (time.get_ylabel(), memory.get_ylabel()) == ("ms", "GiB")
    size = 768 / 1e6
    assert [(line.get_linestyle(), *drawn_line(line)) for line in time.lines] == [
        ("-", (512 * size, 512), (1024 * size, 1024)),
        ("-", (512 * size, 1536), (1024 * size, 3072)),
        ("--", (512 * size, 512), (1024 * size, 1024)),
        ("-", (512 * size, 4608), (1024 * size, 9216)),
    ]
    assert named(time)["ours, CUDA graph"] == style.ACCENT
    assert drawn_line(memory.lines[0]) == [(512 * size, 0.5), (1024 * size, 1)]
    file, output = tmp_path / "b.json", tmp_path / "b.png"
    file.write_text(json.dumps({"machine": MACHINE, "records": records}))
    speed.main([str(file), "--output", str(output)])
    # Versions of matplotlib differ in how they round inches to pixels.
    assert picture_size(output) == pytest.approx((1840, 700), abs=1)
    # Of an older file, our graphs' line and the others' that are missing.
    content = {"machine": {**MACHINE, "device": "another GPU"}, "records": records[:2]}
    content["records"] += [
        record("triton", h, graph=" graph", median_ms=h / 2) for h in (512, 1024)
    ]
    figure = speed.draw(content, {"machine": MACHINE, "records": records})
    time, memory = figure.axes
    assert named(time)["ours, CUDA graph"] == style.ACCENT != named(time)["before, CUDA graph"]
    assert named(time).keys() == {
        "ours", "ours, CUDA graph", "before, CUDA graph", "mamba-ssm's scan", "published code",
    }  # fmt: skip
    now, then = (drawn(time)[named(time)[f"{name}, CUDA graph"]] for name in ("ours", "before"))
    assert (now, then) == (
        [(512 * size, 256), (1024 * size, 512)],
        [(512 * size, 512), (1024 * size, 1024)],
    )
    assert named(memory).keys() == {"ours", "mamba-ssm's scan"}
    assert "another GPU, PyTorch 2; before, and code of others: a GPU" in figure.texts[0].get_text()
    file.write_text(json.dumps({"machine": MACHINE, "records": []}))
    with pytest.raises(UsageError, match="nothing to draw"):
        speed.main([str(file), "--output", str(output)])
    file.write_text("[]")
    with pytest.raises(UsageError, match=r"not a file that tools.benchmark"):
        speed.main([str(file), "--output", str(output)])


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": [{"model": "x"}]}'])
def test_a_file_that_is_no_complexity_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"x\.json is not a file"):
        scaling.main([str(path), str(path), "--output", str(tmp_path / "x.png")])


# Receptive fields


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_checkpoint(tiny_model("convvc"), folder / "convvc.pth.tar", "convvc")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[:160, :192]
    waves = np.stack([rows, columns, rows + columns], axis=-1)
    for i in range(2):
        samples = 127 + 90 * np.sin(waves / (7 + 4 * i)) + 30 * np.cos(waves[..., ::-1] / 3)
        Image.fromarray(samples.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_receptive_field_of_convolutions_ends_where_they_end():
    """g_a of one block a stage: 5x5 at 1, then per stage two 3x3 in the block and a 3x3 onwards."""
    model = models.build_model("convvc", **SHALLOW).eval()
    field = receptive_field.gradient(model.g_a, torch.rand(1, 3, 256, 256))
    reach = 2 + 2 * (1 + 1 + 1) + 4 * (1 + 1 + 1) + 8 * (1 + 1 + 1)
    rows = field.sum(1).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (128 - reach, 128 + reach)
    assert (field >= 0).all()


def test_sides_hold_their_share():
    values = np.zeros((65, 65))
    values[32, 32] = 0.6
    values[22:43, 22:43] += 0.4 / 21**2
    assert receptive_field.sides(values) == {0.5: 1, 0.9: 19, 0.99: 21}


def test_receptive_fields_are_drawn_and_redrawn(tmp_path, checkpoint, pictures, capsys):
    output, file = tmp_path / "erf.png", tmp_path / "erf.npz"
    receptive_field.main(
        [checkpoint, "--data", str(pictures), "--size", "128",
         "--output", str(output), "--save", str(file)]
    )  # fmt: skip
    output.unlink()
    printed = capsys.readouterr().out
    receptive_field.main([str(file), "--output", str(output)])
    assert output.exists()
    assert capsys.readouterr().out == printed
    fields = receptive_field.load(file)
    sides = receptive_field.sides(fields["convvc"])
    assert 0 < sides[0.5] <= sides[0.9] <= sides[0.99] <= 128
    assert printed.startswith("convvc: 50% within ")
    assert f"99% within {sides[0.99]} px" in printed
    axes = receptive_field.draw(fields).axes[0]
    assert axes.get_title() == "CNN variant"
    assert f"99%: {sides[0.99]} px" in axes.get_xlabel()
    (image,) = axes.images
    shown = np.maximum(fields["convvc"] / fields["convvc"].max(), receptive_field.FLOOR)
    assert np.array_equal(image.get_array(), shown)


def test_kept_receptive_fields_are_those_of_the_claims():
    fields = receptive_field.load(ROOT / "results" / "receptive_field.npz")
    held = {name: receptive_field.sides(values)[0.99] for name, values in fields.items()}
    assert held == {"mambavc": 461, "convvc": 65, "swinvc": 169}


def test_receptive_field_needs_large_enough_pictures(tmp_path, checkpoint, pictures):
    arguments = [checkpoint, "--data", str(pictures), "--output", str(tmp_path / "x.png")]
    with pytest.raises(UsageError, match="smaller than --size 192"):
        receptive_field.main([*arguments, "--size", "192"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x.pth.tar", "--data", "x", "--size", "100"], "multiple of 64"),
        (["x.pth.tar"], "need --data FOLDER"),
        (["x.npz", "--data", "x"], "drawn alone"),
        (["x.npz", "y.npz"], "drawn alone"),
        (["x.pth.tar", "--data", "x", "--save", "y"], "ends in .npz"),
    ],
)
def test_receptive_field_refuses(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        receptive_field.main([*options, "--output", str(tmp_path / "x.png")])


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", npz(), npz(x=np.ones(4)), npz(x=np.ones((4, 9))), npy(np.ones((4, 4)))],
    ids=["empty", "text", "no maps", "line", "oblong", "npy"],
)
def test_receptive_field_refuses_other_files(tmp_path, content):
    file = tmp_path / "x.npz"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="not a file that --save wrote"):
        receptive_field.main([str(file), "--output", str(tmp_path / "x.png")])


# Visual comparison


def test_comparison_is_drawn(tmp_path, checkpoint, pictures, capsys):
    output = tmp_path / "visual.png"
    visual.main(
        ["--checkpoint", checkpoint, "--image", str(pictures / "0.png"),
         "--detail", "10", "20", "64", "--output", str(output)]
    )  # fmt: skip
    assert picture_size(output)[0] > 1000
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["Original", "CNN variant", "WebP", "JPEG"]
    x = to_tensor(Image.open(pictures / "0.png"))[None]
    coder = models.Coder(load_model(checkpoint))
    stream = coder.encode(x)
    bpp, db = 8 * len(stream) / (160 * 192), psnr(coder.decode(stream), x)
    assert printed[1] == f"CNN variant: {bpp:.3f} bpp, {db:.2f} dB"


def test_pictures_and_their_details_are_drawn():
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green")]
    images[1].paste("blue", (5, 10, 15, 20))
    figure = visual.draw([("a\n1 bpp", images[0]), ("b\n2 bpp", images[1])], (5, 10, 10))
    assert [text.get_text() for text in figure.texts] == ["a\n1 bpp", "b\n2 bpp"]
    shown = [axes.images[0].get_array() for axes in figure.axes]
    expected = [
        images[0],
        images[0].crop((5, 10, 15, 20)),
        images[1],
        images[1].crop((5, 10, 15, 20)),
    ]
    for array, image in zip(shown, expected, strict=True):
        assert np.array_equal(array, np.asarray(image))


def test_comparison_needs_the_quality_of_a_network_of_every_rate(checkpoint, pictures, tmp_path):
    arguments = ["--image", str(pictures / "0.png"), "--output", str(tmp_path / "v.png")]
    every_rate = save_checkpoint(gained_model(), tmp_path / "x.pth.tar")
    visual.main([*arguments, "--checkpoint", every_rate, "--quality", "50"])
    with pytest.raises(UsageError, match="of every rate; give --quality"):
        visual.main([*arguments, "--checkpoint", every_rate])
    with pytest.raises(UsageError, match="of a single rate; leave out --quality"):
        visual.main([*arguments, "--checkpoint", checkpoint, "--quality", "50"])


def test_a_detail_outside_the_picture_is_refused(tmp_path, checkpoint, pictures):
    with pytest.raises(UsageError, match="192x160"):
        visual.main(
            ["--checkpoint", checkpoint, "--image", str(pictures / "0.png"),
             "--detail", "150", "0", "64", "--output", str(tmp_path / "v.png")]
        )  # fmt: skip
