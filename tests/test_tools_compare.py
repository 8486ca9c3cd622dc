"""The page of pictures: what it is made from, and what it does in a browser."""

import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import gained_model, save_checkpoint, tiny_model
from PIL import Image, ImageChops

import utils
from models import Coder, container, load_model
from tools import compare, pillow_codecs
from tools.pillow_codecs import CODECS, Ladder
from utils import DataError, UsageError

EVIL = '"><script>alert(1)<.png'
EVIL_FOLDER = "</script><script>alert(2)<"  # two folders: names hold no slash
SIZE = (192, 176)  # of pictures; MS-SSIM needs 161
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def photograph(seed, size=SIZE):
    """Smooth areas, edges and grain, so that all codecs have something to lose."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    image.paste(coarse.resize((60, 60), Image.Resampling.NEAREST), (20, 30))
    grain = rng.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two files of one name in different folders, and one whose name is an attack."""
    folder = tmp_path_factory.mktemp("inputs")
    files = [folder / "übung.png", folder / EVIL, folder / EVIL_FOLDER / "übung.png"]
    for seed, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(seed).save(file)
    return files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tiny_model(), tmp_path_factory.mktemp("checkpoint") / "tiny.pth.tar")


@pytest.fixture(scope="module")
def page(inputs, checkpoint, tmp_path_factory):
    """The folder of a page."""
    folder = tmp_path_factory.mktemp("page") / "new"
    compare.main([*map(str, inputs), "--checkpoint", checkpoint, "--output", str(folder)])
    return folder


class Elements(html.parser.HTMLParser):
    """Collects a page's elements, and the text of its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.data = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.data += data


def content(page):
    return json.loads(Elements((page / "index.html").read_text("utf-8")).data)


# The search


@pytest.fixture(scope="module", params=pillow_codecs.available())
def ladder(request):
    return Ladder(photograph(0, (64, 56)), request.param)


def test_quality_is_the_best_that_fits(ladder):
    qualities = ladder.codec.qualities
    sizes = [len(ladder.at(q).data) for q in qualities]
    middle = len(qualities) // 2
    coded = ladder.at_bytes(sizes[middle] + 1)
    assert len(coded.data) <= sizes[middle] + 1
    assert len(coded.data) in sizes[middle:]
    assert Image.open(io.BytesIO(coded.data)).format == ladder.codec.format
    assert ladder.at_bytes(1).quality == qualities[0]
    assert ladder.at_bytes(10**9).quality == qualities[-1]


def test_quality_of_the_nearest_psnr(ladder):
    reached = [ladder.at(q).psnr for q in ladder.codec.qualities]
    target = reached[len(reached) // 2] + 0.03
    coded = ladder.at_psnr(target)
    # PSNR does not rise at every single step, so a few hundredths may be had elsewhere.
    best = min(abs(psnr - target) for psnr in reached)
    assert abs(coded.psnr - target) == pytest.approx(best, abs=0.05)
    x_hat = utils.to_tensor(Image.open(io.BytesIO(coded.data)).convert("RGB"))
    assert coded.psnr == utils.psnr(utils.to_tensor(ladder.image), x_hat)
    assert ladder.at_psnr(0).quality == ladder.codec.qualities[0]
    assert ladder.at_psnr(200).quality == ladder.codec.qualities[-1]


@pytest.mark.parametrize("target", [30.0, float("inf")])
def test_pictures_that_are_coded_without_loss(target):
    ladder = Ladder(Image.new("RGB", (32, 32), "white"), "JPEG")
    assert ladder.at_psnr(target).psnr == float("inf")


# The page


def test_what_the_page_says_is_true_of_its_files(page, inputs):
    pictures = content(page)["pictures"]
    assert len(pictures) == 3
    for picture, file in zip(pictures, inputs, strict=True):
        original = Image.open(page / picture["original"])
        assert original.tobytes() == Image.open(file).tobytes()
        assert [picture["width"], picture["height"]] == list(SIZE)
        names = [compare.OURS, *pillow_codecs.available()]
        for entries in picture["entries"].values():
            assert [entry["codec"] for entry in entries] == names
            for entry in entries:
                data = (page / entry["file"]).read_bytes()
                shown = Image.open(page / entry["picture"])
                assert shown.format == "PNG"
                if entry["codec"] != compare.OURS:
                    decoded = Image.open(io.BytesIO(data)).convert("RGB")
                    assert shown.tobytes() == decoded.tobytes()
                x, x_hat = (utils.to_tensor(image)[None] for image in (original, shown))
                assert entry["bytes"] == f"{len(data):,}"
                assert entry["bpp"] == f"{8 * len(data) / (SIZE[0] * SIZE[1]):.4f}"
                assert entry["psnr"] == f"{utils.psnr(x, x_hat):.2f}"
                assert entry["ms_ssim"] == f"{utils.ms_ssim(x, x_hat):.4f}"
                errors = np.abs(np.asarray(original, int) - np.asarray(shown, int))
                expected = (compare.GAIN * errors).clip(0, 255)
                assert np.array_equal(np.asarray(Image.open(page / entry["error"])), expected)


def test_our_picture_is_what_our_file_decodes_to(page, checkpoint):
    coder = Coder(load_model(checkpoint))
    for picture in content(page)["pictures"]:
        ours = picture["entries"]["bytes"][0]
        x_hat = coder.decode((page / ours["file"]).read_bytes())
        # Another run's float32 synthesis may round a sample to the next level.
        difference = ImageChops.difference(
            utils.to_image(x_hat[0]), Image.open(page / ours["picture"])
        )
        assert max(high for _, high in difference.getextrema()) <= 1


def test_other_codecs_are_at_our_bytes_and_at_our_psnr(page):
    for picture in content(page)["pictures"]:
        ours, *others = picture["entries"]["bytes"]
        limit = (page / ours["file"]).stat().st_size
        for entry in others:
            lowest = CODECS[entry["codec"]].qualities[0]
            size = (page / entry["file"]).stat().st_size
            assert size <= limit or entry["note"].startswith(
                f"quality {lowest}; it comes no nearer"
            )
            excess = size / limit - 1
            assert f"{excess:+.1%} bytes" in entry["note"]
        for entry in picture["entries"]["psnr"][1:]:
            gain = float(entry["psnr"]) - float(ours["psnr"])
            assert abs(gain) < 0.4 or "it comes no nearer" in entry["note"]


def test_names_cannot_break_out_of_the_page(page, inputs):
    elements = Elements((page / "index.html").read_text("utf-8"))
    assert elements.tags.count("script") == 2
    assert [picture["name"] for picture in content(page)["pictures"]] == [
        f"übung.png ({inputs[0].parent})",
        EVIL,
        f"übung.png ({inputs[2].parent})",
    ]
    assert str(inputs[2].parent).endswith(EVIL_FOLDER)


@pytest.mark.parametrize(
    "name", ["</script><img src=x onerror=alert(1)>", "<!--", "$data", "\udc80"]
)
def test_any_name_is_carried_as_it_is(name):
    picture = compare.Comparison(name, 1, 1, "original.png", {"bytes": [], "psnr": []})
    elements = Elements(compare.page(name, ["AVIF"], [picture]))
    data = json.loads(elements.data)
    assert data["pictures"][0]["name"] == data["title"] == name
    assert "This Pillow has no AVIF." in data["about"]
    assert "img" in elements.tags and elements.tags.count("img") == 2


def test_the_page_needs_no_network(page):
    for name in ("index.html", "page.css", "page.js"):
        text = (page / name).read_text("utf-8")
        assert not re.search(r"https?:|//\w|@import|url\(", text.replace("// ", ""))
    used = {
        value
        for _, name, value in Elements((page / "index.html").read_text("utf-8")).attributes
        if name in ("src", "href")
    }
    assert used == {"page.css", "page.js", "data:,"}


def test_a_folder_with_files_is_not_written_to(checkpoint, inputs, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    command = [str(inputs[0]), "--checkpoint", checkpoint, "--output", str(tmp_path)]
    with pytest.raises(UsageError, match=r"is not empty.*--force"):
        compare.main(command)
    assert (tmp_path / "index.html").read_text() == "mine"
    compare.main([*command, "--force"])
    assert content(tmp_path)["pictures"]


def test_missing_pictures_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="none-such does not exist"):
        compare.main(["none-such", "--checkpoint", checkpoint, "--output", str(tmp_path / "out")])


def test_unreadable_and_small_pictures(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    command = [str(folder), "--checkpoint", checkpoint, "--output"]
    with pytest.raises(DataError, match="none of the 1 pictures"):
        compare.main([*command, str(tmp_path / "none")])
    assert not (tmp_path / "none" / "index.html").exists()
    photograph(0, (40, 24)).save(folder / "b.png")
    compare.main([*command, str(tmp_path / "out")])
    (picture,) = content(tmp_path / "out")["pictures"]
    assert picture["name"] == "b.png"
    assert {entry["ms_ssim"] for entry in picture["entries"]["bytes"]} == {"–"}  # noqa: RUF001


def test_a_codec_that_pillow_lacks_is_left_out(checkpoint, inputs, tmp_path, monkeypatch):
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    compare.main([str(inputs[0]), "--checkpoint", checkpoint, "--output", str(tmp_path / "out")])
    data = content(tmp_path / "out")
    codecs = [entry["codec"] for entry in data["pictures"][0]["entries"]["psnr"]]
    assert codecs == ["Ours", "JPEG", "WebP"]
    assert "This Pillow has no AVIF." in data["about"]


def test_a_network_of_every_rate_takes_a_quality(inputs, tmp_path):
    checkpoint = save_checkpoint(gained_model(), tmp_path / "gained.pth.tar")
    output = tmp_path / "page"
    command = [str(inputs[0]), "--checkpoint", checkpoint, "--output", str(output)]
    with pytest.raises(UsageError, match="give --quality"):
        compare.main(command)
    compare.main([*command, "--quality", "30"])
    assert content(output)["title"] == "gained, quality 30"
    ours = content(output)["pictures"][0]["entries"]["bytes"][0]
    assert container.unpack((output / ours["file"]).read_bytes()).quality == 30


def test_a_codec_that_cannot_hold_a_picture_is_left_out(tmp_path):
    """WebP's sides have at most 16,383 pixels."""
    image = photograph(0, (16_400, 2))
    writer = compare.Writer(tmp_path, 1, image)
    comparison = compare.compare(Coder(tiny_model()), image, "wide", writer, ["JPEG", "WebP"], None)
    for entries in comparison.entries.values():
        assert [entry.codec for entry in entries] == ["Ours", "JPEG"]


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing; see tools/README.md"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is missing; see tools/README.md")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-background-networking", "--disable-sync"]
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments, "--force-color-profile=srgb"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """Opens the page in a window; nothing may be complained about, nor asked of a network."""
    complaints, contexts = [], []

    def open_page(width, height, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.on("requestfailed", lambda request: complaints.append(request.url))
        tab.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:")) or complaints.append(request.url)
            ),
        )
        tab.goto((page / "index.html").as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def texts(tab, selector):
    return tab.locator(selector).all_inner_texts()


def box(tab, selector):
    return tab.locator(selector).bounding_box()


def source(tab, side):
    return tab.locator(f"#{side}").get_attribute("src")


def samples(tab, x, y, width, height):
    """RGB of part of the window, in screen pixels."""
    clip = {"x": x, "y": y, "width": width, "height": height}
    return np.asarray(Image.open(io.BytesIO(tab.screenshot(clip=clip))).convert("RGB"))


def test_slider_moves_by_mouse_and_keys(visit):
    tab = visit(1200, 700)
    stage, slider = box(tab, "#stage"), box(tab, "#slider")
    middle = slider["x"] + slider["width"] / 2
    assert middle == pytest.approx(stage["x"] + stage["width"] / 2, abs=1)
    tab.mouse.move(middle, 400)
    tab.mouse.down()
    tab.mouse.move(stage["x"] + stage["width"] / 4, 300, steps=3)
    tab.mouse.up()
    tab.mouse.move(stage["x"] + 10, 300)  # is let go
    assert tab.locator("#slider").get_attribute("aria-valuenow") == "25"
    assert "25%" in tab.locator("#over").evaluate("e => e.style.clipPath")
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#slider").get_attribute("aria-valuenow") == "27"
    assert tab.locator("#picture").evaluate("e => e.selectedIndex") == 0


def test_left_of_the_slider_is_the_original_and_right_the_codec(visit, page):
    tab = visit(1200, 700)
    tab.keyboard.press("2")
    entry = content(page)["pictures"][0]["entries"]["bytes"][1]
    for split, file in ((1, "pictures/001/original.png"), (0, entry["picture"])):
        tab.keyboard.press("0")
        tab.evaluate(f"split({split}); zoomTo(1, 0, 0)")
        place = box(tab, "#left")
        # A part that no label and no knob covers.
        shown = samples(tab, place["x"] + 30, place["y"] + 100, 100, 50)
        expected = np.asarray(Image.open(page / file))
        scale = round(place["width"] / SIZE[0])
        expected = expected.repeat(scale, 0).repeat(scale, 1)[100:150, 30:130]
        assert np.array_equal(shown, expected)


def test_keys_choose_pictures_codecs_and_modes(visit, page):
    tab = visit(1200, 700)
    pictures = content(page)["pictures"]
    tab.keyboard.press("ArrowRight")
    assert texts(tab, "#picture option")[1] == f"2/3 {EVIL}"
    assert source(tab, "left") == pictures[1]["original"]
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert source(tab, "left") == pictures[2]["original"]
    for mode in ("bytes", "psnr"):
        for key, entry in enumerate(pictures[2]["entries"][mode], 1):
            tab.keyboard.press(str(key))
            assert source(tab, "right") == entry["picture"]
            row = tab.locator("tr.chosen td").all_inner_texts()
            assert row == [entry[k] for k in ("codec", "bytes", "bpp", "psnr", "ms_ssim")]
            assert entry["note"] in tab.locator("#note").inner_text()
            assert tab.locator("#file").get_attribute("href") == entry["file"]
        tab.keyboard.press("m")
    tab.keyboard.press("2")
    jpeg = pictures[2]["entries"]["bytes"][1]
    tab.keyboard.press("e")
    assert source(tab, "right") == jpeg["error"]
    assert tab.locator("#right-label").inner_text() == "JPEG: errors × 8"  # noqa: RUF001
    tab.keyboard.press("o")
    assert source(tab, "left") == pictures[2]["entries"]["bytes"][0]["error"]
    tab.keyboard.press("f")
    assert tab.locator("#slider").get_attribute("aria-valuenow") == "0"
    tab.keyboard.press("?")
    assert tab.locator("dl").is_visible()


def test_what_keys_do_buttons_do(visit, page):
    tab = visit(1200, 700)
    picture = content(page)["pictures"][1]
    tab.locator("#next").click()
    tab.get_by_role("button", name="WebP").click()
    tab.get_by_role("button", name="Same PSNR").click()
    assert source(tab, "right") == picture["entries"]["psnr"][2]["picture"]
    tab.locator("#errors").click()
    assert source(tab, "right") == picture["entries"]["psnr"][2]["error"]
    tab.locator("[data-left=Ours]").click()
    assert source(tab, "left") == picture["entries"]["psnr"][0]["error"]
    tab.locator("#picture").select_option(index=2)
    assert source(tab, "left") == content(page)["pictures"][2]["entries"]["psnr"][0]["error"]


@pytest.mark.parametrize("ratio", [1, 1.5, 2.625, 3])  # a telephone's; 8 / 3 is no binary fraction
def test_zoom_is_exact_in_screen_pixels_and_moves_both(visit, page, ratio):
    """Whatever the screen's resolution: a sample is a square of whole pixels, and not blurred."""
    tab = visit(900, 500, device_scale_factor=ratio)
    stage = box(tab, "#stage")
    x, y = stage["x"] + 100, stage["y"] + 300
    tab.mouse.move(x, y)
    while tab.locator("#zoom").inner_text() != "800 %":
        tab.mouse.wheel(0, -100)
    tab.mouse.down()
    tab.mouse.move(x - 37, y - 11, steps=5)
    tab.mouse.up()
    left, right = (
        tab.locator(f"#{side}").evaluate("e => e.style.cssText") for side in ("left", "right")
    )
    assert left == right
    tab.keyboard.press("f")
    tab.keyboard.press("f")  # the original alone
    # A part of the stage that no label and no knob covers, in whole screen pixels.
    shown = samples(tab, stage["x"] + 60, stage["y"] + 80, 200, 200)
    place = box(tab, "#left")
    original = np.asarray(Image.open(page / "pictures" / "001" / "original.png"))
    start = [round((stage[k] + d - place[k]) * ratio) for k, d in (("y", 80), ("x", 60))]
    rows, columns = ((s + np.arange(n)) // 8 for s, n in zip(start, shown.shape, strict=False))
    assert np.array_equal(shown, original[rows[:, None], columns])


def test_zoom_keeps_the_point_under_the_mouse(visit):
    tab = visit(900, 500)
    stage = box(tab, "#stage")
    tab.evaluate("zoomTo(8, 0, 0)")
    x, y = stage["x"] + stage["width"] / 3, stage["y"] + stage["height"] / 3

    def point():
        place = box(tab, "#left")
        return (x - place["x"]) / place["width"], (y - place["y"]) / place["height"]

    before = point()
    tab.mouse.move(x, y)
    tab.mouse.wheel(0, -100)
    assert tab.locator("#zoom").inner_text() == "1200 %"
    assert point() == pytest.approx(before, abs=0.001)  # a screen pixel is 0.0004 of the picture
    tab.keyboard.press("0")
    place = box(tab, "#left")
    assert place["x"] >= stage["x"] and place["height"] <= stage["height"]


@pytest.mark.parametrize("width", [320, 390, 820])
def test_it_fits_a_telephone(visit, width):
    tab = visit(width, 700, device_scale_factor=3, has_touch=True, is_mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#stage", "table", "header", "#picture", "#next", "#in"):
        place = box(tab, selector)
        assert place["x"] >= 0 and place["x"] + place["width"] <= width + 0.5
    assert box(tab, "#stage")["height"] > 250
    for button in tab.get_by_role("button").all():
        assert min(button.bounding_box()[k] for k in ("width", "height")) >= 34


def test_fingers_move_the_slider_pan_and_pinch(visit):
    tab = visit(390, 700, device_scale_factor=3, has_touch=True, is_mobile=True)
    session = tab.context.new_cdp_session(tab)

    def touch(*steps):
        """Fingers that are put down, moved and lifted: their points at each step."""
        for i, points in enumerate([*steps, []]):
            kind = "touchStart" if i == 0 else "touchMove" if points else "touchEnd"
            places = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    stage = box(tab, "#stage")
    y = stage["y"] + 60
    touch([(195, y)], [(150, y)], [(117, y)])
    assert tab.locator("#slider").get_attribute("aria-valuenow") == "30"
    touch([(180, y), (220, y)], [(160, y), (240, y)], [(100, y), (300, y)])
    zoom = tab.locator("#zoom").inner_text()
    assert re.fullmatch(r"\d+ %", zoom) and int(zoom[:-2]) >= 1000
    before = box(tab, "#left")
    touch([(250, y)], [(240, y + 15)], [(230, y + 30)])
    after = box(tab, "#left")
    assert before["x"] - after["x"] == pytest.approx(20, abs=1)
    assert tab.evaluate("scrollY") == 0


def test_without_scripts_it_says_where_the_pictures_are(visit):
    tab = visit(800, 600, java_script_enabled=False)
    assert "pictures" in tab.locator("body").inner_text()
