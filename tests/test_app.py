"""The app in a real browser: the Space, served from a folder as it is published, visited with Chromium."""

import io
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import apm_hf
from apm_hf.data.scenes import make_scene

SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"
# Every file field, button, number, slider and choice that can be seen says what it is for.
NAMELESS = """
    const label = e => [...(e.labels ?? [])].some(l => l.innerText.trim());
    const named = e => e.ariaLabel || e.innerText?.trim() || e.title || label(e);
    return [...document.querySelectorAll('input, textarea, button, [role=tab]')]
        .filter(e => e.checkVisibility() && !named(e)).map(e => e.outerHTML.slice(0, 200));"""
# What is seen beyond the right edge of the window.
OVERFLOWING = """
    const beyond = e => e.getBoundingClientRect().right > innerWidth;
    return [...document.querySelectorAll('.apm, .apm *')].filter(beyond).map(e => e.outerHTML.slice(0, 200));"""
# The grounds of all that is seen on a page, where they are not transparent.
GROUNDS = """
    const all = [...document.querySelectorAll('body, body *')];
    const large = all.filter(e => e.checkVisibility() && e.clientWidth > 100);
    const grounds = large.map(e => getComputedStyle(e).backgroundColor);
    return grounds.filter(c => !/, 0\\)$|transparent/.test(c));"""
# Keeps every heading that the last column of the table of scores ever had.
RECORD_HEADINGS = """
    window.headings = new Set();
    const record = () => window.headings.add(document.querySelector('#scores thead th:last-child')?.innerText);
    new MutationObserver(record).observe(document.body, {subtree: true, childList: true, characterData: true});"""


@pytest.fixture(scope="module")
def chromium():
    """What starts Chromium; where it, playwright or gradio is missing, all tests here skip."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium: scripts/install_browser.sh installs Debian's")
    return executable


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory, environment):
    """Where the Space is served: by a process of its own, of a folder as it is published, on 127.0.0.1."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(SPACE, folder, dirs_exist_ok=True)
    shutil.copytree(Path(apm_hf.__file__).parent, folder / "apm_hf", ignore=shutil.ignore_patterns("__pycache__"))
    package = folder / "apm_hf" / "__init__.py"
    package.write_text(package.read_text().replace(f'"{apm_hf.__version__}"', '"of the Space"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "uploads")}
    assets = folder / "apm_hf" / "assets"  # the demo's models, whose adaptation is small
    settings |= {"APM_MODEL": str(assets / "demo-apm"), "APM_TEACHER": str(assets / "demo-teacher")}
    settings |= {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=settings, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


class Visit:
    """A page, what it logged, and what it asked for."""

    def __init__(self, browser, address, **options):
        self.problems, self.requests = [], []
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#islands img")

    def source(self, selector):
        return self.page.get_attribute(selector, "src")

    def wait_for_another(self, selector, source):
        """Until the picture is another one than `source`, and drawn."""
        drawn = "([selector, source]) => { const image = document.querySelector(selector);"
        drawn += " return image && image.src !== source && image.complete && image.naturalWidth > 0; }"
        self.page.wait_for_function(drawn, arg=[selector, source])

    def run(self, script):
        return self.page.evaluate("() => {" + script + "}")

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def upload(self, photo, path):
        """As visitors do: the photo that is there is taken away, and the empty field clicked."""
        remove, field = f"{photo} button[aria-label='Remove Image']", f"{photo} button[aria-label^='Drop an image']"
        if self.page.locator(remove).count():
            self.page.click(remove)
        with self.page.expect_file_chooser() as chooser:
            self.page.click(field)
        chooser.value.set_files(path)

    def message(self, text):
        """Read the message with this text, and close it."""
        toast = self.page.get_by_test_id("toast-body").filter(has_text=text)
        toast.wait_for()
        toast.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")

    def check(self):
        assert not self.problems
        others = [url for url in self.requests if not re.match(r"http://127\.0\.0\.1:|data:|blob:", url)]
        assert not others and len(self.requests) > 10


@pytest.fixture(scope="module")
def visited(address, browser):
    return Visit(browser, address, viewport={"width": 1280, "height": 900})


@pytest.fixture
def visit(visited):
    """One page for all tests, which is checked after each for errors, and for requests to other hosts."""
    yield visited
    visited.check()


@pytest.fixture
def scene(tmp_path):
    make_scene(5, seed=12, image_size=96).image.resize((120, 90)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_the_page_is_served_by_the_package_beside_the_space_and_says_what_it_knows(visit):
    text = visit.page.inner_text("body")
    assert "apm_hf of the Space." in text and "have never seen a photograph" in text


def test_an_uploaded_photo_gives_islands_at_three_heights_beside_features_and_controls(visit, scene):
    visit.tab("Islands")
    before = visit.source("#islands img")
    visit.upload("#islands-photo", scene)
    visit.wait_for_another("#islands img", before)
    visit.wait_for_another("#similar img", None)
    sizes = visit.page.eval_on_selector_all(
        "#islands img, #made-of img", "images => images.map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[480, 360]] * 8
    captions = visit.page.locator("#islands figcaption b, #made-of figcaption b").all_inner_texts()
    assert captions == [
        *("2 wholes", "6 parts", "20 sub-parts", "Control: 6 parts"),
        *("Features", "Teacher", "RGB decoded", "Control: features"),
    ]


def test_a_click_on_the_photo_shows_what_is_like_that_point(visit):
    visit.tab("Islands")
    before = visit.source("#similar img")
    photo = visit.page.locator("#islands-photo img")
    box = photo.bounding_box()
    photo.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.8})
    visit.wait_for_another("#similar img", before)
    y, x = (float(visit.page.input_value(f"#point-{name} input")) for name in "yx")
    assert (y, x) == (pytest.approx(0.6, abs=0.03), pytest.approx(-0.5, abs=0.03))
    assert f"y {y:.2f}, x {x:.2f}" in visit.page.inner_text("#similar figcaption")


def test_the_keyboard_alone_points_at_a_place(visit):
    visit.tab("Islands")
    before = visit.source("#similar img")
    keyboard = visit.page.keyboard
    visit.page.focus("#point-y input")
    keyboard.press("ControlOrMeta+a")
    keyboard.type("0.4")
    keyboard.press("Tab")
    keyboard.press("ControlOrMeta+a")
    keyboard.type("0.3")
    keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.innerText") == "Show what is like this point"
    keyboard.press("Enter")
    visit.wait_for_another("#similar img", before)
    assert "y 0.40, x 0.30" in visit.page.inner_text("#similar figcaption")


def test_a_file_that_is_no_photo_gets_a_message_and_the_next_photo_islands(visit, scene, tmp_path):
    visit.tab("Islands")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    for name, sentence in {"text.png": "cannot be read as a picture", "huge.png": "more than 50 megapixels"}.items():
        visit.upload("#islands-photo", tmp_path / name)
        visit.message(sentence)
        assert visit.page.locator("#islands img, #made-of img, #similar img").count() == 0
    visit.page.click("#islands-photo button[aria-label='Remove Image']")
    visit.page.click("#point-show")
    visit.message("There is no photo yet")
    visit.upload("#islands-photo", scene)
    visit.wait_for_another("#islands img", None)
    visit.wait_for_another("#similar img", None)


def test_labels_show_the_teacher_against_the_apm_while_it_adapts(visit):
    visit.tab("Labels")
    visit.run(RECORD_HEADINGS)
    visit.page.fill("#labels textarea", "house, cat, boat, tree")
    visit.page.click("#adapt")
    visit.page.get_by_role("columnheader", name="APM, step 60").wait_for()
    assert visit.page.locator("#scores thead th").all_inner_texts() == [
        "label",
        "teacher",
        "APM before",
        "APM, step 60",
    ]
    assert visit.page.locator("#scores tbody th").all_inner_texts() == ["house", "cat", "boat", "tree"]
    best = visit.page.locator("#scores tbody tr").first.locator("td.apm-best").all_inner_texts()
    assert len(best) >= 2 and all(float(score.split()[0]) > 90 for score in (best[0], best[-1]))  # a house is shown
    assert len(visit.page.evaluate("[...window.headings]")) > 3  # live: seen on the way
    visit.wait_for_another("#curve img", None)
    before, after = map(float, re.findall(r"(-?[0-9.]+) (?:before|after)", visit.page.inner_text("#curve figcaption")))
    assert before < 0.6 < after <= 1


def test_labels_that_cannot_be_used_get_a_message(visit):
    visit.tab("Labels")
    for text, sentence in {
        " ": "two labels at least",
        ",".join(f"label {number}" for number in range(31)): "31 labels are too many",
        "house, zebra": "no words for: zebra",
    }.items():
        visit.page.fill("#labels textarea", text)
        visit.page.click("#adapt")
        visit.message(sentence)
    visit.page.get_by_role("columnheader", name="APM, step 60").wait_for()
    assert visit.page.locator("#scores tbody th").all_inner_texts() == ["house", "zebra"]


def test_the_slider_moves_between_two_photos(visit, scene):
    visit.tab("Blends")
    before = visit.source("#between img")
    visit.upload("#blend-A", scene)
    visit.wait_for_another("#between img", before)
    before = visit.source("#between img")
    visit.page.focus("#share input[type=range]")
    visit.page.keyboard.press("ArrowRight")
    visit.wait_for_another("#between img", before)
    assert "at 55 % of photo B" in visit.page.inner_text("#between")
    assert visit.page.locator("#between img").count() == 2


def test_every_field_and_button_has_a_name(visit):
    for name in ("Islands", "Labels", "Blends"):
        visit.tab(name)
        visit.page.wait_for_timeout(100)
        assert visit.run(NAMELESS) == []


def test_the_footer_leads_to_what_programs_can_call(address, browser):
    visit = Visit(browser, address, viewport={"width": 1280, "height": 900})
    visit.page.get_by_role("button", name="Use via API").click()
    for endpoint in ("/islands", "/classify", "/encode"):
        visit.page.get_by_text(endpoint).first.wait_for()
    assert "No API Routes found" not in visit.page.inner_text("body")
    # Gradio's panel also asks for what is switched off, MCP and monitoring: two errors in the log.
    assert all(url.startswith((address, "data:", "blob:")) for url in visit.requests)


def test_a_scene_is_chosen_with_a_click(visit):
    visit.tab("Islands")
    before = visit.source("#islands img")
    visit.page.get_by_role("button", name="Example 4").first.click()
    visit.wait_for_another("#islands img", before)
    visit.wait_for_another("#similar img", None)


def test_another_number_of_regions_is_shown_at_once_and_nothing_else_changes(visit):
    visit.tab("Islands")
    before, features = visit.source("#islands img"), visit.source("#made-of img")
    visit.page.fill("#num-Wholes input", "3")
    visit.wait_for_another("#islands img", before)
    assert visit.page.locator("#islands figcaption b").first.inner_text() == "3 wholes"
    assert visit.source("#made-of img") == features
    visit.page.fill("#num-Wholes input", "7")  # more than parts
    visit.message("each above the last")
    assert visit.page.locator("#islands figcaption b").first.inner_text() == "3 wholes"
    visit.page.fill("#num-Wholes input", "2")


def test_on_a_phone_results_come_first_in_two_columns_and_the_page_is_short(address, browser):
    phone = Visit(browser, address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    for name, pictures, columns in (
        ("Islands", "#islands img", 2),
        ("Labels", "#curve img", 1),
        ("Blends", "#between img", 2),
    ):
        phone.tab(name)
        if name == "Labels":
            phone.page.click("#adapt")
            phone.page.get_by_role("columnheader", name="APM, step 60").wait_for()
        phone.page.wait_for_selector(pictures)
        boxes = [picture.bounding_box() for picture in phone.page.locator(pictures).all()]
        assert len({round(box["x"]) for box in boxes}) == columns and boxes[0]["width"] > 300 / columns
        assert phone.page.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth == 390")
        assert phone.run(OVERFLOWING) == []
        assert phone.page.evaluate("document.documentElement.scrollHeight") < 2500
        if name == "Islands":
            assert boxes[0]["y"] < phone.page.locator("#islands-photo").bounding_box()["y"]
    phone.check()


def test_a_dark_page_has_no_white_boxes(address, browser):
    dark = Visit(browser, address + "?__theme=dark", viewport={"width": 1280, "height": 900}, color_scheme="dark")
    for name, element in (("Islands", "#similar"), ("Labels", "#curve")):
        dark.tab(name)
        if name == "Labels":
            dark.page.click("#adapt")
            dark.page.get_by_role("columnheader", name="APM, step 60").wait_for()
        dark.page.wait_for_selector(f"{element} img")
        shown = Image.open(io.BytesIO(dark.page.locator(f"{element} img").screenshot())).convert("L")
        corners = [shown.getpixel((x, y)) for x in (1, shown.width - 2) for y in (1, shown.height - 2)]
        assert name == "Islands" or max(corners) < 60, "the ground of a drawing is the page's"
    grounds = dark.run(GROUNDS)
    assert grounds and all(sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 120 for ground in grounds), grounds
    dark.check()
