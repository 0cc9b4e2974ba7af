"""The app without a browser: actions as plain functions, what visitors may give, the served app, the Space."""

import base64
import copy
import gc
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import SpaceCard, SpaceCardData
from PIL import Image

from apm_hf import APMConfig
from apm_hf.app import MAX_SESSIONS, decode, launch, uploads
from apm_hf.app.blend_tab import blend, blend_pictures
from apm_hf.app.islands_tab import (
    island_pictures,
    made_of_pictures,
    photo_features,
    point_of_pixel,
    similarity_picture,
)
from apm_hf.app.labels_tab import adaptation, curve_picture
from apm_hf.app.models import load_models
from apm_hf.app.pictures import Picture, figures_html, scores_html
from apm_hf.app.recent import Recent
from apm_hf.app.uploads import GONE, MAX_LABELS, Uploads, read_labels
from apm_hf.assets import DEMO_MODEL, DEMO_TEACHER, PHOTO_MODEL, PHOTO_TEACHER
from apm_hf.data.scenes import make_scene
from fixtures_runs import forked

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"


@pytest.fixture(scope="module")
def models():
    """The demo's APM, its teacher and the control."""
    return load_models(DEMO_MODEL, DEMO_TEACHER)


@pytest.fixture(scope="module")
def scene():
    return make_scene(3, seed=11, image_size=96).image


@pytest.fixture(scope="module")
def seen(models, scene):
    return photo_features(models, scene, size=64)


def pixels(picture):
    return np.asarray(picture.image, dtype=np.int16)


def differ(one, other):
    return np.abs(pixels(one) - pixels(other)).mean()


def test_islands_stand_at_three_heights_beside_what_they_are_made_of_and_controls(models, seen):
    islands, made_of = island_pictures(seen, (2, 5, 9)), made_of_pictures(models, seen)
    assert [picture.title for picture in islands] == ["2 wholes", "5 parts", "9 sub-parts", "Control: 5 parts"]
    assert [picture.title for picture in made_of] == ["Features", "Teacher", "RGB decoded", "Control: features"]
    for row in (islands, made_of):
        assert [picture.is_control for picture in row] == [False, False, False, True]
        assert all(picture.image.size == (480, 480) and picture.image.mode == "RGB" for picture in row)
        assert min(differ(row[0], other) for other in row[1:]) > 2
    again = island_pictures(seen, (2, 5, 9)), made_of_pictures(models, seen)
    assert all(
        differ(*two) == 0
        for row, same in zip((islands, made_of), again, strict=True)
        for two in zip(row, same, strict=True)
    )
    decoded = made_of[2].image.resize((24, 24), Image.Resampling.BOX)
    photo = seen.photo.resize((24, 24), Image.Resampling.BOX)
    assert np.abs(np.asarray(decoded, dtype=float) - np.asarray(photo)).mean() < 25  # the photo, if blurred


@pytest.mark.parametrize("heights", [(6, 2, 20), (2, 2, 3), (0, 1, 2), (2, 6, 10**6)])
def test_heights_that_are_no_heights_are_refused(seen, heights):
    with pytest.raises(ValueError, match="three numbers of regions, each above the last|too many for this photo"):
        island_pictures(seen, heights)


def test_a_photo_of_any_shape_has_islands_in_its_shape(models):
    wide = photo_features(models, Image.effect_noise((300, 40), 50).convert("RGB"), size=64)
    islands, made_of = island_pictures(wide), made_of_pictures(models, wide)
    assert {picture.image.size for picture in islands + made_of} == {(480, 64)}


def test_without_a_teacher_islands_are_shown_and_labels_refused(models, scene, seen):
    alone = copy.copy(models)
    object.__setattr__(alone, "apm", copy.copy(models.apm))
    object.__setattr__(alone.apm, "teacher", None)
    assert [picture.title for picture in made_of_pictures(alone, seen)] == [
        "Features",
        "RGB decoded",
        "Control: features",
    ]
    with pytest.raises(ValueError, match="Labels need a teacher that reads"):
        next(adaptation(alone, scene, ["cat", "boat"]))


def test_similarity_is_to_the_point_given(models, seen):
    picture = similarity_picture(models, seen, (0.5, -0.5))
    assert "y 0.50, x -0.50" in picture.note
    assert differ(picture, similarity_picture(models, seen, (0.5, -0.5))) == 0
    assert differ(picture, similarity_picture(models, seen, (-0.7, 0.6))) > 2
    with pytest.raises(ValueError, match="outside of the photo"):
        similarity_picture(models, seen, (0.0, 1.1))


def test_pixels_become_coordinates_of_the_photo_as_it_is_shown(tmp_path):
    assert point_of_pixel(0, 0, (200, 100)) == pytest.approx((-0.99, -0.995))
    assert point_of_pixel(149.5, 24.5, (200, 100)) == pytest.approx((-0.5, 0.5))
    turned = Image.new("RGB", (80, 60))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    given, path = Uploads(tmp_path), str(tmp_path / "turned.jpg")
    assert given.shown_size(path) == (60, 80) == given.read(path).size


def test_photos_of_all_kinds_are_read_and_large_ones_scaled(tmp_path):
    def read(name, image, **options):
        image.save(tmp_path / name, **options)
        return Uploads(tmp_path).read(str(tmp_path / name))

    clear = read("clear.png", Image.new("RGBA", (3000, 20), (255, 0, 0, 0)))
    assert clear.size == (1024, 7) and clear.getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16))
    assert read("deep.png", deep).getpixel((0, 0)) == (156, 156, 156)
    assert read("deep.tif", deep.resize((3000, 20))).getpixel((500, 3)) == (156, 156, 156)
    assert read("fractions.tif", Image.new("F", (5, 4), 0.4)).getpixel((0, 0)) == (102, 102, 102)
    palette = Image.new("P", (2, 2))
    palette.putpalette([9, 99, 199, 1, 2, 3])
    assert read("palette.gif", palette).getpixel((0, 0)) == (9, 99, 199)
    assert read("clear.gif", palette, transparency=0).getpixel((0, 0)) == (255, 255, 255)
    assert read("black.ico", Image.new("RGB", (64, 64))).size == (64, 64)
    assert read("large.png", Image.new("RGBA", (7000, 7000), (1, 2, 3, 255))).getpixel((9, 9)) == (1, 2, 3)


def icon(png):
    """An ICO file that says it is 256 pixels wide, whatever the PNG in it is."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def apple_icon(png):
    return b"icns" + struct.pack(">I", len(png) + 16) + b"ic10" + struct.pack(">I", len(png) + 8) + png


def black_png(width, height):
    """A grey PNG of any size, in a few hundred kilobytes and little memory."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), bytes(1 + width)
    data = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb():
    """A picture of 170 megapixels, as PNG."""
    return black_png(13_000, 13_100)


def test_what_is_no_photo_gets_one_clear_sentence(tmp_path, bomb):
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "bomb.ico").write_bytes(icon(bomb))
    (tmp_path / "bomb.icns").write_bytes(apple_icon(bomb))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    whole = io.BytesIO()
    make_scene(0).image.save(whole, format="JPEG")
    (tmp_path / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    for name, sentence in {
        "huge.png": "more than 50 megapixels",
        "bomb.png": "more than 50 megapixels",
        "bomb.ico": "more than 50 megapixels",
        "bomb.icns": "more than 50 megapixels",
        "text.png": "cannot be read as a picture",
        "program.eps": "cannot be read as a picture",
        "half.jpg": "damaged",
    }.items():
        with pytest.raises(ValueError, match=sentence) as raised:
            Uploads(tmp_path).read(str(tmp_path / name))
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(ValueError, match="There is no photo yet"):
        Uploads(tmp_path).read(None)


def test_nothing_but_regular_files_of_the_upload_folder_is_opened(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    for where in (tmp_path, folder):
        Image.new("RGB", (4, 4)).save(where / "photo.png")
        os.mkfifo(where / "pipe")
    (folder / "link.png").symlink_to(tmp_path / "photo.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    assert Uploads(folder).read(str(folder / "photo.png")).size == (4, 4)
    others = [tmp_path / "photo.png", tmp_path / "pipe", tmp_path / "none.png", folder / "pipe", folder / "none.png"]
    others += [folder / "link.png", folder / "circle.png", folder / ".." / "photo.png", folder, "/dev/zero", "", "\0"]
    for path in [*map(str, others), "x" * 10_000, "http://127.0.0.1/photo.png"]:
        for read in (Uploads(folder).read, Uploads(folder).shown_size):
            with pytest.raises(ValueError, match=f"^{re.escape(GONE)}$"):
                read(path)


def test_a_picture_that_takes_too_long_is_given_up_and_its_process_ended(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    for name, endless in (("waits.py", "time.sleep(99)"), ("counts.py", "decode.limit_process()\nwhile True: pass")):
        # In the place of the decoder.
        find = f"import os, sys, time; sys.path.append({str(Path(decode.__file__).parent)!r}); import decode"
        (tmp_path / name).write_text(f"{find}\ndecode.MAX_SECONDS = 1\n{endless}")
        monkeypatch.setattr(uploads, "_MAX_SECONDS", 2 if name == "waits.py" else 60)
        monkeypatch.setattr(decode, "__file__", str(tmp_path / name))
        with pytest.raises(ValueError, match="takes too long"):
            Uploads(tmp_path).read(str(tmp_path / "photo.png"))
        assert not psutil.Process().children()
        monkeypatch.undo()


def test_the_decoder_starts_with_pillow_alone_and_its_memory_is_bounded():
    code = f"""if True:
        import runpy, sys
        limits = runpy.run_path({decode.__file__!r})
        limits["limit_process"]()
        try: bytearray(limits["MAX_BYTES"])
        except MemoryError: print({{"torch", "numpy", "apm_hf"}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


class Value:
    """A value of so many bytes."""

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes


def test_what_was_used_last_is_remembered_within_bounds():
    recent, computed = Recent(max_entries=3, max_bytes=100, max_seconds=60), []

    def get(key, num_bytes=10):
        return recent.get(key, lambda: computed.append(key) or Value(num_bytes))

    first = get("a")
    assert [get(key) for key in "bca"][-1] is first and computed == ["a", "b", "c"]
    get("d")  # a fourth: b was not used for the longest time
    get("a"), get("c"), get("b")
    assert computed == ["a", "b", "c", "d", "b"] and len(recent) == 3
    get("large", 85)  # beside the last of 10 bytes alone
    assert len(recent) == 2 and recent.num_bytes == 95
    get("too large", 101)
    assert len(recent) == 2 and recent.num_bytes == 95


def test_what_was_not_used_for_long_is_forgotten_though_nobody_comes():
    recent = Recent(max_entries=9, max_bytes=100, max_seconds=0.1)
    recent.get("a", lambda: Value(1))
    recent.get("b", lambda: Value(1))
    for _ in range(100):
        if not len(recent):
            break
        time.sleep(0.05)
    assert not len(recent)


def test_labels_are_read_and_checked(models):
    assert read_labels(" cat,  sailing \tboat\ncat,,tree\n") == ["cat", "sailing boat", "tree"]
    for text, sentence in {
        "": "two labels at least",
        "cat, cat": "two labels at least",
        ", ".join(map(str, range(MAX_LABELS + 1))): f"{MAX_LABELS + 1} labels are too many",
        f"cat, {'a' * 61}": "60 characters at most",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            read_labels(text)
    assert models.teacher.unknown_labels(["cat", "zebra", "tree"]) == ["zebra"]


def test_adaptation_brings_the_apm_to_its_teacher(models, scene):
    before = {name: weight.clone() for name, weight in models.model.state_dict().items()}
    labels = models.apm.default_labels
    seen = list(adaptation(models, scene, labels, start="random", num_steps=40))
    assert [progress.step for progress in seen] == [*range(0, 40, 4), 40]
    assert [len(progress.cosines) for progress in seen] == list(range(1, 12))
    cosines = dict(seen[-1].cosines)
    assert cosines[0] < 0.5 < 0.7 < cosines[40] <= 1
    for progress in seen:
        assert progress.before == seen[0].now and progress.teacher == seen[0].teacher
        assert sum(progress.now) == pytest.approx(1, abs=1e-4) and len(progress.now) == len(labels) == 12
    assert labels[np.argmax(seen[-1].teacher)] == labels[np.argmax(seen[-1].now)] == "cat"
    assert list(adaptation(models, scene, labels, start="random", num_steps=40)) == seen
    assert all(torch.equal(weight, before[name]) for name, weight in models.model.state_dict().items())
    curve = curve_picture(seen[-1], 40)
    assert f"{cosines[0]:.2f} before, {cosines[40]:.2f} after 40 steps" in curve.note and curve.image.width > 300
    distilled = next(adaptation(models, scene, labels, start="model", num_steps=1))
    assert distilled.cosines[0][1] > cosines[0] + 0.3


def test_an_adaptation_that_nobody_waits_for_ends(models, scene):
    num_threads = threading.active_count()
    frames = adaptation(models, scene, ["cat", "boat"], num_steps=100_000)
    assert next(frames).step == 0
    frames.close()
    assert threading.active_count() == num_threads


def test_a_blend_begins_and_ends_with_its_photos(models, scene, seen):
    other = make_scene(6, seed=11, image_size=96).image
    way = blend(models, scene, other)
    for alpha, photo in ((0.0, scene), (1.0, other)):
        expected = photo_features(models, photo, size=96).features
        frame = way.frame(alpha)
        cosine = torch.nn.functional.cosine_similarity(frame.features, expected, dim=-1)
        assert cosine.min() > 0.999
    first, middle, last = (blend_pictures(way, alpha) for alpha in (0.0, 0.5, 1.0))
    assert [picture.title for picture in middle] == ["RGB decoded", "Features"] and "50 % of photo B" in middle[0].note
    assert min(differ(first[0], last[0]), differ(first[1], middle[1]), differ(middle[1], last[1])) > 5
    column_alone = blend_pictures(blend(models, scene, other, patches="a"), 1.0)
    assert differ(column_alone[1], last[1]) > 5
    with pytest.raises(ValueError, match="between 0 and 1"):
        blend_pictures(way, 1.5)


def test_a_teacher_alone_is_shown_with_its_dense_student_on_every_tab(monkeypatch):
    preset = APMConfig.preset
    small = {"image_size": 56, "hidden_sizes": [64], "position_size": 16}  # what is adapted
    monkeypatch.setattr(APMConfig, "preset", lambda name, **fields: preset(name, **fields, **small))
    models = load_models(teacher=PHOTO_TEACHER)
    assert models.model.name_or_path == PHOTO_MODEL and len(models.examples()) == 6
    labels, cat, other = models.example_labels(), *models.examples()[1:3]
    assert not models.teacher.unknown_labels(labels) and 2 <= len(labels) <= MAX_LABELS
    seen = photo_features(models, cat, size=24)
    islands, made_of = island_pictures(seen, (2, 5, 9)), made_of_pictures(models, seen)
    assert len(islands) == 4 and [one.title for one in made_of] == ["Features", "Teacher", "Control: features"]
    assert differ(made_of[0], made_of[1]) > 1  # finer than the teacher's grid
    assert similarity_picture(models, seen, (0.0, 0.0)).title == "Like the point"
    way = blend(models, cat, other)
    alone = photo_features(models, cat, size=96).features
    assert torch.nn.functional.cosine_similarity(way.frame(0.0).features, alone, dim=-1).min() > 0.999
    assert differ(blend_pictures(way, 0.0)[0], blend_pictures(way, 1.0)[0]) > 5
    with pytest.raises(ValueError, match="cannot be adapted: please start from random weights"):
        next(adaptation(models, cat, labels, start="model"))
    *_, last = adaptation(models, cat, labels, start="random", num_steps=40)
    assert labels[np.argmax(last.teacher)] == "cat" and last.cosines[-1][1] > last.cosines[0][1] + 0.3


def test_labels_to_begin_with_are_few_and_of_a_classifier_its_own(shared_dir):
    """Of 1,000 classes those that the teacher finds in the examples, whatever it finds there."""
    models = load_models(teacher=str(shared_dir / "teachers/deit-tiny"))
    labels = models.example_labels()
    assert 6 <= len(labels) <= MAX_LABELS and set(labels) < set(models.teacher.class_names)
    assert "espresso" in labels


def test_what_visitors_write_is_text_on_the_page():
    html = scores_html(["<b>x</b>", "y"], [("teacher", [0.25, 0.75])], "a caption")
    assert "&lt;b&gt;x&lt;/b&gt;" in html and "<b>" not in html and "25.0 %" in html
    figure = figures_html([Picture('"><script>', Image.new("RGB", (2, 3)), "seen", is_control=True)])
    assert "<script>" not in figure and 'width="2" height="3"' in figure and "apm-control" in figure


def test_a_teacher_needs_the_model_that_learnt_from_it():
    with pytest.raises(ValueError, match="expected an APM distilled from the teacher"):
        load_models(teacher=DEMO_TEACHER)


@pytest.fixture(scope="module")
def server(tmp_path_factory, environment):
    """The app, served on 127.0.0.1 by a child of this process: its address, its process, its upload folder."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def serve():
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment, GRADIO_TEMP_DIR=str(folder / "uploads"))
        launch(DEMO_MODEL, DEMO_TEACHER, port=port)

    process = psutil.Process(forked(serve))
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.status() != psutil.STATUS_ZOMBIE, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process, folder / "uploads"
    finally:
        process.terminate()
        process.wait(30)


class Visitor:
    """A session of the page, without a browser: what a browser would send, or anything else."""

    patience = 60  # seconds that an event may take

    def __init__(self, address):
        import httpx

        self.http = httpx.Client(base_url=address, timeout=60, trust_env=False)
        self.session = uuid.uuid4().hex
        self.config = self.http.get("/config").json()
        self.components = {component["props"].get("elem_id"): component for component in self.config["components"]}

    def event(self, elem_id, name):
        target = [self.components[elem_id]["id"], name]
        return next(event for event in self.config["dependencies"] if target in event["targets"])

    def scene(self, elem_id="islands-photo"):
        """The photo that the page opens with, as a browser sends it back."""
        return self.components[elem_id]["props"]["value"]

    def upload(self, name, data):
        path = self.http.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def send(self, event, data):
        """What the event outputs, and what the visitor is told; outputs are None where Gradio reports an error."""
        body = {"fn_index": event["id"], "data": data, "session_hash": self.session}
        assert self.http.post("/gradio_api/queue/join", json=body).status_code == 200
        told, deadline = [], time.monotonic() + self.patience
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():  # some line comes every 15 seconds
                assert time.monotonic() < deadline, "this visitor is not served"
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "log":
                    told.append(message["log"])
                if message.get("msg") == "process_completed":
                    output = message["output"]
                    return output.get("data"), [*told, *filter(None, [output.get("error")])]
        raise AssertionError("the stream ended before the event")

    def islands(self, photo):
        return self.send(self.event("num-Wholes", "change"), [photo, 2, 6, 20])

    def similar(self, photo):
        return self.send(self.event("point-show", "click"), [photo, 0.1, 0.2])


@pytest.fixture
def new_visitor(server):
    """Open the page in a session of its own."""
    visitors = []

    def open_page():
        visitors.append(Visitor(server[0]))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.http.close()


def memory_peak(process):
    """The most memory, in MB, that a process has had resident."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1000


def test_a_request_reads_uploads_alone_and_learns_nothing_of_other_files(server, tmp_path, new_visitor):
    _, _, folder = server
    Image.new("RGB", (40, 30), "red").save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    visitor = new_visitor()
    assert visitor.islands(visitor.scene())[0][0].count("<img") == 4
    example = next(
        event
        for event in visitor.config["dependencies"]
        if event["outputs"] == [visitor.components["islands-photo"]["id"]]
    )
    paths = [tmp_path / "secret.png", tmp_path / "none.png", tmp_path, folder / "link.png", folder / "none.png"]
    for chosen in (False, True):  # a scene was chosen before
        if chosen:
            visitor.http.post(f"/gradio_api/run/{example['api_name']}", json={"data": [2], "fn_index": example["id"],
                              "session_hash": visitor.session}).raise_for_status()  # fmt: skip
        for path in map(str, paths):
            outputs, told = visitor.islands({"path": path})
            assert "<img" not in str(outputs) and told == [GONE]
            for photo in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path, "url": path}):
                outputs, told = visitor.islands(photo)
                assert "<img" not in str(outputs) and set(told) <= {GONE} and "png" not in str([outputs, told])


def test_an_upload_is_read_and_its_address_on_this_server_too_but_no_other_address(server, scene, new_visitor):
    address, _, _ = server
    visitor, file = new_visitor(), io.BytesIO()
    scene.save(file, format="PNG")
    photo = visitor.upload("scene.png", file.getvalue())
    expected = visitor.similar(photo)[0]
    assert "<img" in expected[0]
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        for base, served in ((address, True), (f"http://127.0.0.1:{other.getsockname()[1]}", False)):
            where = f"{base}/gradio_api/file={photo['path']}" if served else f"{base}/photo.png"
            outputs, told = visitor.similar({**photo, "path": where})
            assert (outputs, told) == ((expected, []) if served else (None, [GONE]))
        with pytest.raises(TimeoutError):
            other.accept()
    outside = {**photo, "path": f"{address}/gradio_api/file=/dev/zero"}
    assert visitor.similar(outside)[1] == [GONE]


def test_pipes_keep_no_other_visitor_waiting(server, tmp_path, new_visitor):
    _, _, folder = server
    pipes = [tmp_path / "pipe", folder / "pipe"]
    for pipe in pipes:
        os.mkfifo(pipe)
    with ThreadPoolExecutor(4) as attackers:
        attacks = [
            attackers.submit(lambda pipe: new_visitor().islands({"path": str(pipe)}), pipe) for pipe in 2 * pipes
        ]
        time.sleep(0.5)
        visitor = new_visitor()
        visitor.patience = 30
        try:
            assert visitor.islands(visitor.scene())[0][0].count("<img") == 4
        finally:
            while not all(attack.done() for attack in attacks):  # whatever opened a pipe goes on
                for pipe in pipes:
                    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
                time.sleep(0.1)
    assert all("<img" not in str(attack.result()) and attack.result()[1] == [GONE] for attack in attacks)


def test_a_picture_hidden_in_an_icon_is_refused_before_it_is_decoded(server, bomb, new_visitor):
    _, process, _ = server
    visitor = new_visitor()
    visitor.islands(visitor.scene())
    before = memory_peak(process)
    outputs, told = visitor.islands(visitor.upload("bomb.ico", icon(bomb)))
    assert "<img" not in str(outputs) and len(told) == 1 and "more than 50 megapixels" in told[0]
    assert memory_peak(process) < before + 60


def test_the_memory_of_new_sessions_is_bounded(server, new_visitor):
    _, process, _ = server
    for _ in range(5):
        new_visitor().similar(new_visitor().scene())
    before = process.memory_info().rss
    for _ in range(25):
        visitor = new_visitor()
        assert "<img" in visitor.similar(visitor.scene())[0][0]
    assert process.memory_info().rss < before + 25 * 2e6


def test_the_number_of_sessions_is_bounded(monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    options, page = {}, SimpleNamespace(launch=lambda **given: options.update(given))
    monkeypatch.setattr("apm_hf.app.models.load_models", lambda *names: None)
    monkeypatch.setattr("apm_hf.app.page.build_page", lambda models: page)
    launch()
    assert options["state_session_capacity"] == MAX_SESSIONS == 100


# Of Gradio's client, when it ends.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_programs_call_three_endpoints_and_none_else(server, models, scene, tmp_path, new_visitor):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    address, _, _ = server
    scene.save(tmp_path / "scene.png")
    described = new_visitor().http.get("/gradio_api/info").json()
    assert list(described["named_endpoints"]) == ["/islands", "/classify", "/encode"]
    assert not described["unnamed_endpoints"]
    for endpoint in described["named_endpoints"].values():
        assert endpoint["description"].endswith(".") and endpoint["parameters"][0]["parameter_name"] == "image"
    client = Client(address, verbose=False, download_files=str(tmp_path / "downloads"))
    photo = handle_file(str(tmp_path / "scene.png"))
    embeds = client.predict(photo, api_name="/encode")
    assert embeds == pytest.approx(models.apm.encode(scene)[0].tolist(), abs=1e-3)
    picture, maps = client.predict(photo, wholes=3, parts=5, sub_parts=7, api_name="/islands")
    assert Image.open(picture).size == (3 * 480, 480) and maps["heights"] == [3, 5, 7]
    regions = np.array(maps["regions"])
    assert regions.shape == (3, 64, 64) and [len(np.unique(cut)) for cut in regions] == [3, 5, 7]
    scores = client.predict(photo, ["cat", "boat", "cat"], num_steps=30, api_name="/classify")
    assert scores["labels"] == ["cat", "boat"] and scores["teacher"][0] > 0.9 < scores["student"][0]
    assert scores["student_before"] != scores["student"] and scores["cosine"] > 0.6
    secret = {"path": "/etc/hostname"}
    for name, values, sentence in (
        ("/encode", [secret], re.escape(GONE)),
        ("/encode", [None], "There is no photo yet"),
        ("/islands", [photo, 6, 2, 20], "expected ascending numbers of regions"),
        ("/islands", [photo, "two", 2, 20], "expected whole numbers"),
        ("/classify", [photo, ["cat"]], "two labels at least"),
        ("/classify", [photo, "cat, boat"], "expected a list of texts"),
        ("/classify", [photo, ["cat", "boat"], 10**9], "from 1 to 200"),
        ("/classify", [photo, ["cat", "boat"], 9, "else"], 'expected "model" or "random"'),
    ):
        with pytest.raises(AppError, match=sentence):
            client.predict(*values, api_name=name)
    client.close()
    gc.collect()


def test_no_request_passes_the_queue_by(server, new_visitor):
    visitor = new_visitor()
    answer = visitor.http.post("/gradio_api/run/encode", json={"data": [visitor.scene()]})
    assert answer.status_code == 404


def test_mcp_clients_call_the_same_endpoints(server, models, scene, new_visitor):
    pytest.importorskip("mcp", reason="mcp is not installed: pip install 'gradio[mcp]'")
    file, visitor = io.BytesIO(), new_visitor()
    scene.save(file, format="PNG")

    def call(method, **params):
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        headers = {"Accept": "application/json, text/event-stream"}
        lines = visitor.http.post("/gradio_api/mcp/", json=body, headers=headers).text.splitlines()
        return json.loads([line for line in lines if line.startswith("data:")][-1][5:])["result"]

    tools = call("tools/list")["tools"]
    assert [tool["name"] for tool in tools] == ["islands", "classify", "encode"]
    assert all(tool["description"] and tool["inputSchema"]["properties"]["image"] for tool in tools)
    expected = pytest.approx(models.apm.encode(scene)[0].tolist(), abs=1e-3)
    upload = visitor.upload("scene.png", file.getvalue())["path"]
    encoded = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for photo in (encoded, f"{server[0]}/gradio_api/file={upload}"):
        result = call("tools/call", name="encode", arguments={"image": photo})
        assert not result["isError"] and json.loads(result["content"][0]["text"]) == expected
    for photo in ("http://127.0.0.1:9/photo.png", f"{server[0]}/gradio_api/file=/etc/hostname"):
        result = call("tools/call", name="encode", arguments={"image": photo})
        assert result["isError"] and GONE in result["content"][0]["text"]
    # Asked for progress, Gradio sends each output by itself; else all of them as one text.
    asked = {"name": "islands", "arguments": {"image": encoded}, "_meta": {"progressToken": 1}}
    picture, address, maps = call("tools/call", **asked)["content"]
    assert (picture["type"], picture["mimeType"]) == ("image", "image/png") and "islands.png" in address["text"]
    assert "'heights': [2, 6, 20]" in maps["text"]


def test_without_gradio_the_app_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"apm_hf\[app\]"):
        launch()


def test_the_space_is_described_as_the_hub_wants_it():
    card = SpaceCard((SPACE / "README.md").read_text())
    assert isinstance(card.data, SpaceCardData)
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py") and (SPACE / card.data.app_file).is_file()
    assert f"gradio=={card.data.sdk_version}\n" in (ROOT / "constraints.txt").read_text()
    assert len(card.data.short_description) <= 60  # the Hub's limit
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card.data["colorFrom"], card.data["colorTo"]} <= colours
    assert len((SPACE / "app.py").read_text().splitlines()) <= 60


def test_the_space_asks_for_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["app"], *extras["viz"]} - {"apm_hf[viz]"}
    assert {line for line in (SPACE / "requirements.txt").read_text().splitlines() if line[0] not in "#-"} == wanted
