"""BD-rates against published values, the figures, and what the scripts refuse."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

import models
from tools.figures import architecture, plot, receptive_field, scaling, speed, style, visual
from tools.figures.plot import PUBLISHED, Curve, bd_rate, load_curve
from utils import UsageError

TINY = {
    "N": 8,
    "M": 20,
    "depths": (1, 1, 1, 1),
    "Z": 8,
    "context_width": 16,
    "transform_width": 16,
}


def curve(bpp, psnr, name="c"):
    return Curve(name, np.array(bpp, float), {"psnr": np.array(psnr, float)}, {})


def write_result(path, bpp, **columns):
    results = {"bpp": bpp, "psnr-rgb": [30 + 5 * b for b in bpp], **columns}
    path.write_text(json.dumps({"name": path.stem, "description": "", "results": results}))
    return str(path)


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
    (row,) = plot.bd_table(anchor, [curve([1.5 * bpp], [psnr])])
    assert f"| c | +50.00 % | at {psnr:.2f} dB |" in plot.format_table([row], anchor, "pchip")
    touching = curve([0.1, 0.2], [anchor.quality["psnr"][-1], 60])
    (row,) = plot.bd_table(anchor, [touching])
    assert "| c |  | no overlap |  |" in plot.format_table([row], anchor, "pchip")


def test_bd_rate_that_does_not_exist_is_nan():
    anchor = curve([0.1, 0.2], [28, 31])
    assert math.isnan(bd_rate(anchor, curve([0.1, 0.2], [40, 42])))
    assert math.isnan(bd_rate(anchor, curve([0.1, 0.2], [31, 32])))
    assert math.isnan(bd_rate(anchor, curve([0.1], [27])))
    assert math.isnan(bd_rate(curve([0.1], [29]), anchor))
    assert math.isnan(bd_rate(anchor, curve([0.1, 0.2], [30, 29])))
    assert math.isnan(bd_rate(anchor, anchor, metric="ms-ssim"))


def test_table_lists_every_curve_best_first(capsys, tmp_path):
    file = tmp_path / "bd.json"
    plot.main(["bpg", "elic", "--ours", "mambavc", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["MambaVC (paper)", "ELIC", "BPG 4:4:4"]
    assert rows[1]["ms-ssim"] is None
    assert rows[1]["psnr_interval"] == pytest.approx([29.113, 37.624])
    printed = capsys.readouterr().out
    assert "| ELIC | -7.02 % | 29.1 to 37.6 dB |  |" in printed


# Result files


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_published_points_rise_and_name_their_source(path):
    data = json.loads(path.read_text())
    assert data["source"] and data["uncertainty"]
    points = load_curve(path.stem)
    assert (np.diff(points.bpp) > 0).all()
    assert all((np.diff(values) > 0).all() for values in points.quality.values())


def test_files_of_one_rate_each_join_to_a_curve(tmp_path):
    low = write_result(tmp_path / "low.json", [0.2], encode_time=[1.0], decode_time=[2.0])
    high = write_result(tmp_path / "high.json", [0.4], encode_time=[3.0])
    joined = load_curve(f"{high},{low}")
    assert joined.name == "high"
    assert joined.bpp.tolist() == [0.2, 0.4]
    assert joined.quality["psnr"].tolist() == [31.0, 32.0]
    assert joined.seconds == {"encode-time": 2.0}


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


def test_an_unknown_curve_is_refused_with_the_known_names():
    with pytest.raises(UsageError, match="tcm-large"):
        load_curve("vvc")


# Figures


@pytest.mark.parametrize("panel", plot.PANELS)
@pytest.mark.parametrize("points", [1, 2])
def test_every_panel_is_drawn_with_ours(tmp_path, monkeypatch, panel, points):
    for label in ("label_point", "label_lines"):  # names have their curve's colour
        monkeypatch.setattr(style, label, lambda *args: None)
    columns = {
        "ms-ssim-rgb": [0.95, 0.98],
        "encode_time": [0.5, 0.6],
        "decode_time": [0.7, 0.8],
    }
    columns = {key: values[:points] for key, values in columns.items()}
    ours = write_result(tmp_path / "ours.json", [0.3, 0.6][:points], **columns)
    output = tmp_path / "rd.png"
    plot.main(["elic", "--ours", ours, "--panels", panel, "--output", str(output)])
    assert picture_size(output) == (1000, 800)
    accent = ImageColor.getrgb(style.ACCENT)
    colours = Image.open(output).convert("RGB").getcolors(2**24)
    assert sum(count for count, colour in colours if colour == accent) > 50


def test_a_panel_without_data_is_refused(tmp_path):
    output = tmp_path / "rd.png"
    one = write_result(tmp_path / "one.json", [0.3])
    with pytest.raises(UsageError, match="panel saving"):
        plot.main(["elic", "--anchor", one, "--panels", "saving", "--output", str(output)])
    with pytest.raises(UsageError, match="decode-time"):
        plot.main(["elic", "--panels", "decode-time", "--output", str(output)])
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


@given(st.lists(st.floats(-10, 10), max_size=12), st.floats(0.01, 3))
def test_labels_are_spread_in_order(positions, gap):
    moved = style.spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    steps = np.diff([moved[i] for i in order])
    assert (steps >= gap * (1 - 1e-9)).all()
    wanted = np.diff(sorted(positions))
    if (wanted >= gap).all():
        assert moved == positions


def test_measured_quantities_get_a_panel_each(tmp_path):
    part = {"parameters": 1, "macs": 10**9, "flops": 2 * 10**9}
    measured = {
        "forward": {"seconds": 0.1, "seconds_20": 0.1, "seconds_80": 0.1, "peak_bytes": 2**30}
    }
    rows = [
        {
            "model": model, "height": height, "width": width, **part, "macs": height * width,
            "parts": dict.fromkeys(["g_a", "g_s", "h_a", "h_s", "context", "other"], part),
            "measured": measured if height == 512 else {"forward": None},
        }
        for model in ("mambavc", "convvc") for height, width in ((512, 768), (1024, 1024))
    ]  # fmt: skip
    file, output = tmp_path / "c.json", tmp_path / "c.png"
    file.write_text(json.dumps({"device": "a GPU", "batch_size": 1, "rows": rows}))
    scaling.main([str(file), "--output", str(output)])
    # Bars, MACs, memory and time of the forward pass: two rows of two panels of 920x700, a footer.
    # Versions of matplotlib differ in how they round inches to pixels.
    assert picture_size(output) == pytest.approx((1840, 1450), abs=1)


def test_speed_has_a_panel_for_each_quantity(tmp_path):
    def record(backend, height, group="scaling", **values):
        name = f"forward {height}x768" + (" graph" if group == "network" else "")
        return {"group": group, "name": name, "backend": backend, **values}

    records = [
        record(backend, height, median_ms=factor * height, peak_mib=height)
        for backend, factor in (("triton", 1), ("mamba_ssm", 3)) for height in (1024, 512)
    ]  # fmt: skip
    records += [record("auto", height, "network", median_ms=height) for height in (512, 1024)]
    records += [record("triton", 2048, error="out of memory")]
    found = speed.lines(records, "median_ms")
    assert found["mamba-ssm's scan"] == [(512 * 768 / 1e6, 1536), (1024 * 768 / 1e6, 3072)]
    assert len(found) == 3
    assert len(speed.lines(records, "peak_mib")) == 2
    file, output = tmp_path / "b.json", tmp_path / "b.png"
    file.write_text(json.dumps({"machine": {"device": "a GPU", "torch": "2"}, "records": records}))
    speed.main([str(file), "--output", str(output)])
    assert picture_size(output) == pytest.approx((1840, 700), abs=1)
    file.write_text(json.dumps({"machine": {"device": "a GPU", "torch": "2"}, "records": []}))
    with pytest.raises(UsageError, match="nothing to draw"):
        speed.main([str(file), "--output", str(output)])
    file.write_text("[]")
    with pytest.raises(UsageError, match=r"not a file that benchmark.py"):
        speed.main([str(file), "--output", str(output)])


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": [{"model": "x"}]}'])
def test_a_file_that_is_no_complexity_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"x\.json is not a file"):
        scaling.main([str(path), "--output", str(tmp_path / "x.png")])


# Receptive fields


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = models.build_model("convvc", **TINY)
    model.update()
    path = tmp_path_factory.mktemp("checkpoint") / "convvc.pth.tar"
    torch.save(
        {"model": "convvc", "model_args": model.config, "state_dict": model.state_dict()}, path
    )
    return path


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
    model = models.build_model("convvc", **TINY).eval()
    field = receptive_field.gradient(model, torch.rand(1, 3, 256, 256), "y")
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
        [str(checkpoint), "--data", str(pictures), "--size", "128",
         "--output", str(output), "--save", str(file)]
    )  # fmt: skip
    assert picture_size(output)[0] > 300
    printed = capsys.readouterr().out
    output.unlink()
    receptive_field.main([str(file), "--output", str(output)])
    assert picture_size(output)[0] > 300
    assert capsys.readouterr().out == printed
    sides = receptive_field.sides(receptive_field.load(file)["convvc"])
    assert 0 < sides[0.5] <= sides[0.9] <= sides[0.99] <= 128
    assert printed.startswith("convvc: 50% within ")
    assert f"99% within {sides[0.99]} px" in printed


def test_kept_receptive_fields_are_those_of_the_claims():
    fields = receptive_field.load(Path(receptive_field.__file__).parent / "receptive_field.npz")
    held = {name: receptive_field.sides(values)[0.99] for name, values in fields.items()}
    assert held == {"mambavc": 461, "convvc": 65, "swinvc": 169}


def test_receptive_field_needs_large_enough_pictures(tmp_path, checkpoint, pictures):
    arguments = [str(checkpoint), "--data", str(pictures), "--output", str(tmp_path / "x.png")]
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


@pytest.mark.parametrize("name", visual.FORMATS)
def test_quality_is_the_best_that_fits(pictures, name):
    image = Image.open(pictures / "0.png")
    options = visual.FORMATS[name]
    sizes = [len(visual.encode_pillow(image, q, **options)) for q in visual.QUALITIES]
    budget = sizes[40] + 1
    data = visual.at_size(image, budget, **options)
    assert len(data) <= budget
    assert Image.open(io.BytesIO(data)).format == options["format"]
    assert len(data) in sizes[40:]
    assert visual.at_size(image, 1, **options) == visual.encode_pillow(image, 1, **options)


def test_comparison_is_drawn(tmp_path, checkpoint, pictures, capsys):
    output = tmp_path / "visual.png"
    visual.main(
        ["--checkpoint", str(checkpoint), "--image", str(pictures / "0.png"),
         "--detail", "10", "20", "64", "--output", str(output)]
    )  # fmt: skip
    assert picture_size(output)[0] > 1000
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["Original", "CNN variant", "WebP", "JPEG"]


def test_a_detail_outside_the_picture_is_refused(tmp_path, checkpoint, pictures):
    with pytest.raises(UsageError, match="192x160"):
        visual.main(
            ["--checkpoint", str(checkpoint), "--image", str(pictures / "0.png"),
             "--detail", "150", "0", "64", "--output", str(tmp_path / "v.png")]
        )  # fmt: skip
