"""Bad input: what each gets told, what is skipped and listed, and what our own source must never do."""

import errno
import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
import yaml
from safetensors import SafetensorError
from torch.utils.data import IterableDataset
from transformers import AutoImageProcessor, AutoModel

import apm_hf  # noqa: F401 - registers the Auto classes
from apm_hf import APMConfig, APMModel
from apm_hf.commands.main import main
from apm_hf.data.augmentation import RandomCrops
from apm_hf.data.images import ImageCollator, decode_image
from apm_hf.data.loading import load_images
from apm_hf.data.streams import Reconnecting
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.evaluation.labels.suites import evaluate
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.publishing.cards import CardFacts, write_card
from apm_hf.runs.files import write_atomically
from apm_hf.runs.unreadable_images import SKIPPED, numbered, packed, problems
from apm_hf.teachers import load_teacher
from apm_hf.teachers.targets import TargetCache
from apm_hf.teachers.zero_shot import read_labels
from fixtures_runs import forget_accelerate
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, TEACHER_GRID, photo, save_clip, student

SQUARE = {"height": STUDENT_SIZE, "width": STUDENT_SIZE}
PROCESSOR = APMImageProcessorPil(size=SQUARE)
CROPPING = APMImageProcessorPil(size={"shortest_edge": 448}, do_center_crop=True, crop_size=SQUARE)
SOURCE = Path(apm_hf.__file__).parent


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size, with next to no pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    packed_chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed_chunks)


PNG, JPEG = encoded(photo(0)), encoded(photo(0), "JPEG")


def collate(image, **options):
    return ImageCollator(options.pop("processor", PROCESSOR), **options)([{"image": image, "index": 7}])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apm")
    student().save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()


# --- what every viewer shows, and what is printed -------------------------------------------------------------------


def with_bad_exif(kind):
    """An image whose EXIF data are damaged, of which the pixels are good."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    data = bytearray(encoded(photo(0), kind, exif=exif))
    at = data.index(b"Exif") + 6 if kind == "JPEG" else data.index(b"eXIf") + 4
    data[at : at + 14] = b"\xff" * 14
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_whose_exif_data_are_damaged_is_read_as_it_lies(kind):
    image = decode_image(with_bad_exif(kind))
    plain = decode_image(encoded(photo(0), kind))
    assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(plain.convert("RGB")))
    assert PROCESSOR(image, return_tensors="pt")["pixel_values"].shape[-2:] == (STUDENT_SIZE, STUDENT_SIZE)


def test_labels_come_from_a_file_of_a_sensible_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="Expected a text file of labels, got .*, which is no regular file"):
            read_labels(path)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="Expected a JSON list of strings in .*deep.json"):
        read_labels(tmp_path / "deep.json")
    (tmp_path / "long.txt").write_text("\n".join(f"label {number}" for number in range(200_000)))
    with pytest.raises(ValueError, match=r"Expected at most [\d,]+ bytes of labels in .*long.txt, got"):
        read_labels(tmp_path / "long.txt")


def test_what_is_printed_from_outside_is_one_line_that_a_terminal_does_not_obey(tmp_path, capfd, caplog):
    name = str(tmp_path / "photo\x1b[31m\nred.jpg")
    Path(name).write_bytes(b"junk")
    assert main(["classify", name]) == 1
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "\x1b" not in message and "\n" not in message and "photo\\x1b[31m\\nred.jpg: cannot decode" in message
    photo(0).save(name.replace(".jpg", ".png"))
    (tmp_path / "labels").write_text("car\nc\x1b[31mat\nb\x07oat\n")
    assert main(["classify", name.replace(".jpg", ".png"), "--labels", str(tmp_path / "labels"), "--steps", "1"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "photo\\x1b[31m\\nred.png" in out
    assert "c\\x1b[31mat, b\\x07oat" in caplog.text and "\x1b" not in caplog.text and "\x07" not in caplog.text


def test_numbers_of_any_kind_make_a_card_that_yaml_reads(tmp_path):
    student().save_pretrained(tmp_path)
    metrics = {"feature_cosine": np.float64(0.5), "embed_cosine": torch.tensor(0.25), "rgb_mse": float("nan")}
    names = {"repo_id": "a/b", "teacher": "facebook/dinov2-small", "dataset": "org/photos", "command": "apm distill"}
    facts = CardFacts(**names, steps=3, num_parameters=10, metrics=metrics)
    card = write_card(tmp_path, facts).read_text()
    front = yaml.safe_load(card.split("---")[1])
    found = {one["type"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    assert found == {"feature_cosine": 0.5, "embed_cosine": 0.25} and "python" not in card.split("---")[1]


def test_corruptions_of_a_suite_may_name_the_clean_images(tmp_path):
    folder = evaluate(
        "smoke", output_dir=str(tmp_path / "run"), corruptions=["none", "contrast"], severities=[2], max_images=4,
        methods=["zero_shot"],
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {line["corruption"] for line in lines} == {"none", "contrast"}


def test_an_evaluation_of_a_folder_without_classes_says_what_it_lacks(tmp_path, clip):
    for number in range(4):
        (tmp_path / "photos/train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos/test").mkdir(exist_ok=True)
        photo(number).save(tmp_path / "photos" / ("train", "test")[number % 2] / f"{number}.png")
    with pytest.raises(
        ValueError, match="found no labels .*: labelled images lie in a folder for each class"
    ) as caught:
        evaluate("photos", output_dir=str(tmp_path / "run"), data=[str(tmp_path / "photos")], teachers=[clip.name])
    assert "--label_column" not in str(caught.value)


# --- the table: what comes in, and the one message it gets -----------------------------------------------------------


class Case:
    """Where bad input may be made: a folder, a saved model in it, and ways in."""

    def __init__(self, folder, saved):
        self.folder, self.saved = folder, saved

    def file(self, name, content=b""):
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def model(self, **files):
        """A copy of the model with other contents of `config.json` and so on; None removes a file."""
        copy = self.folder / "model"
        shutil.copytree(self.saved, copy)
        names = {"config": "config.json", "weights": "model.safetensors", "processor": "preprocessor_config.json"}
        for key, content in files.items():
            path = copy / names[key]
            path.unlink() if content is None else path.write_bytes(content)
        return copy

    def config(self, **changes):
        return json.dumps(json.loads((self.saved / "config.json").read_text()) | changes).encode()

    def weights(self, size):
        return (self.saved / "model.safetensors").read_bytes()[:size]

    def link(self):
        (self.folder / "one").symlink_to(self.folder / "two")
        (self.folder / "two").symlink_to(self.folder / "one")
        return str(self.folder / "one")

    def pipe(self):
        os.mkfifo(self.folder / "pipe")
        return str(self.folder / "pipe")

    def sparse(self):
        os.truncate(self.file("a.jpg", b"\xff"), 2**40)
        return str(self.folder / "a.jpg")

    def parquet(self, name="data.parquet", *, cut=None, **columns):
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        parquet.write_table(arrow.table(columns), self.folder / name)
        content = (self.folder / name).read_bytes()
        return self.file(name, content if cut is None else content[:cut])

    def images(self, name="data.parquet"):
        return self.parquet(name, image=[PNG] * 4, label=[0, 1, 0, 1])


def teacher_like(**changes):
    """Targets as of a teacher, one thing about which is wrong."""
    generator = torch.Generator().manual_seed(0)
    width = changes.pop("width", FEATURE_SIZE)
    pixels = torch.randn(4, 3, changes.pop("side", STUDENT_SIZE), STUDENT_SIZE, generator=generator)
    features = torch.randn(4, TEACHER_GRID, TEACHER_GRID, width, generator=generator)
    if "broken" in changes:
        features[2] = changes.pop("broken")
    return TargetCache(pixels, torch.randn(4, width, generator=generator), features)


def fit(folder, data, **settings):
    settings = {"max_steps": 2, "batch_size": 4, "report_to": "none", "mixed_precision": "no", **settings}
    config = DistillationConfig(output_dir=str(folder), **settings)
    return distill(student(), data, config=config, image_processor=PROCESSOR)


def float_tiff(*values):
    return encoded(PIL.Image.fromarray(np.array([values], np.float32)), "TIFF")


def ask(coordinates):
    return student()(torch.zeros(1, 3, STUDENT_SIZE, STUDENT_SIZE), coordinates)


TABLE = {
    # images, by row
    "zero bytes": (lambda c: collate(b""), "row 7: .*0 bytes: expected an encoded image, got an empty file"),
    "zero-byte file": (lambda c: collate(c.file("a.jpg")), "row 7: .*a.jpg': .*got an empty file"),
    "truncated JPEG": (lambda c: collate(JPEG[: len(JPEG) // 2]), "row 7: cannot decode .* bytes: "),
    "truncated PNG": (lambda c: collate(PNG[: len(PNG) // 2]), "row 7: cannot decode .* bytes: .*truncated"),
    "truncated GIF": (lambda c: collate(encoded(photo(0), "GIF")[:60]), "row 7: cannot decode 60 bytes"),
    "truncated WebP": (lambda c: collate(encoded(photo(0), "WEBP")[:60]), "row 7: cannot decode 60 bytes"),
    "truncated TIFF": (lambda c: collate(encoded(photo(0), "TIFF")[:99]), "row 7: cannot decode 99 bytes"),
    "text": (lambda c: collate(b"hello"), "row 7: .*expected an encoded image.*data of another kind"),
    "error page": (lambda c: collate(b"<html>404"), "row 7: .*got a page of HTML or XML"),
    "zip": (lambda c: collate(c.file("a.png", b"PK\x03\x04...")), "row 7: .*a.png': .*got a zip archive"),
    "SVG": (lambda c: collate(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "row 7: .*HTML or XML"),
    "EPS": (lambda c: collate(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "row 7: .*pixels, got EPS"),
    "bomb": (lambda c: collate(png_header(20_000, 20_000)), r"row 7: .*400000000 pixels\) exceeds limit"),
    "strip": (
        lambda c: collate(encoded(PIL.Image.new("L", (30_000, 1))), processor=CROPPING),
        "row 7: .*not so narrow, got 30000 x 1 pixels, .*13440000 x 448",
    ),
    "strip for the teacher": (
        lambda c: collate(encoded(PIL.Image.new("L", (1, 30_000))), teacher_image_processor=CROPPING),
        "row 7: .*got 1 x 30000 pixels",
    ),
    "float TIFF out of range": (lambda c: collate(float_tiff(-5, 1000)), r"row 7: .*got \[-5, 1000\]"),
    "NaN TIFF": (lambda c: collate(float_tiff(0, np.nan)), "row 7: .*expected finite pixels, got 1 NaN"),
    "folder": (lambda c: collate(str(c.folder)), "row 7: .*expected a file, got a folder"),
    "missing": (lambda c: collate(str(c.folder / "none.png")), "row 7: .*none.png': No such file"),
    "links in a circle": (lambda c: collate(c.link()), "row 7: .*one': Too many levels of symbolic links"),
    "pipe": (lambda c: collate(c.pipe()), "row 7: .*pipe': expected a file, got a device"),
    "file without end": (lambda c: collate(c.sparse()), r"row 7: .*a.jpg': expected at most [\d,]+ bytes, got"),
    "path with NUL": (lambda c: collate("a\0b"), "row 7: .*null byte"),
    "long path": (lambda c: collate("x" * 5000), r"row 7: .*xxx\.\.\.xxx.*name too long"),
    "number": (lambda c: collate(3), "row 7: expected a PIL image, .*got int"),
    "nothing": (lambda c: collate({"bytes": None, "path": None}), "row 7: expected a PIL image, .*got NoneType"),
    "no image column": (lambda c: ImageCollator(PROCESSOR)([{"img": PNG}]), "row 0 .*'image' but .*--image_column"),
    "text label": (lambda c: ImageCollator(PROCESSOR, label_column="y")([{"image": PNG, "y": "a"}]), "got 'a'"),
    "huge label": (
        lambda c: ImageCollator(PROCESSOR, label_column="label")([{"image": PNG, "label": 2**70}]),
        "row 0 .*64-bit integer in column 'label'",
    ),
    "path to the processor": (lambda c: PROCESSOR(c.file("b.png")), "images: expected a readable image, got .*b.png"),
    "pipe to the processor": (lambda c: PROCESSOR(c.pipe()), "images: .*pipe': not a file"),
    "bomb to the processor": (lambda c: PROCESSOR(c.file("b.png", png_header(30_000, 30_000))), "b.png': .*exceeds"),
    "no image": (lambda c: PROCESSOR([]), "images: expected at least one image, got none"),
    # data sets
    "no data": (lambda c: load_images(c.folder / "nowhere"), "nowhere"),
    "empty name": (lambda c: load_images(""), "dataset: expected a folder, .*got ''"),
    "empty folder": (lambda c: load_images(c.folder), "doesn't contain any data files"),
    "another file": (lambda c: load_images(c.file("a.csv", b"x")), "expected a folder, a parquet file.*a.csv"),
    "zero-byte parquet": (lambda c: load_images(c.file("a.parquet")), "a.parquet: .*size is 0 bytes"),
    "no parquet": (lambda c: load_images(c.file("a.parquet", b"PAR1 broken")), "a.parquet: .*magic bytes not found"),
    "torn parquet": (lambda c: load_images(c.parquet(image=[PNG], cut=400)), "data.parquet: cannot be read"),
    "empty parquet": (
        lambda c: load_images(c.parquet(image=[])), "data.parquet: expected at least one image, got none"
    ),
    "no column of images": (lambda c: load_images(c.parquet(x=[1])), r"no image column among \['x'\].*--image_column"),
    "column of numbers": (lambda c: load_images(c.parquet(x=[1]), image_column="x"), "cannot read images from .*'x'"),
    "unknown image column": (lambda c: load_images(c.images(), image_column="img"), "no column 'img'"),
    "unknown label column": (lambda c: load_images(c.images(), label_column="y"), "no column 'y'.*--label_column"),
    "unknown split": (lambda c: load_images(c.images(), split="dev"), r"no split 'dev'; choose one of \['train'\]"),
    "part of a split": (lambda c: load_images(c.images(), split="train[abc]"), r"data.parquet: .*train\[abc\]"),
    "no rows in the part": (lambda c: load_images(c.images(), split="train[50:60]"), r"data.parquet: .*\[50:60\]"),
    "broken saved data set": (lambda c: c.file("state.json", b"{") and load_images(c.folder), "neither a `Dataset`"),
    # models
    "misspelt field": (lambda c: APMConfig(hiden_sizes=[3]), "'hiden_sizes'; did you mean 'hidden_sizes'"),
    "misspelt at loading": (lambda c: APMConfig.from_pretrained(c.saved, hiden_sizes=[3]), "mean 'hidden_sizes'"),
    "misspelt for a model": (lambda c: AutoModel.from_pretrained(c.saved, hiden_sizes=[3]), "mean 'hidden_sizes'"),
    "field that fits not": (lambda c: APMConfig.from_pretrained(c.saved, patch_size=5), "image_size: .*multiple of"),
    "another architecture": (lambda c: APMModel.from_pretrained(c.model(config=c.config(model_type="vit"))), "'vit'"),
    "no JSON": (lambda c: AutoModel.from_pretrained(c.model(config=b"{")), "config.json' is not a valid JSON"),
    "binary configuration": (lambda c: AutoModel.from_pretrained(c.model(config=b"\xff\xfe")), "not a valid JSON"),
    "torn weights": (lambda c: AutoModel.from_pretrained(c.model(weights=c.weights(5000))), "model.safetensors: "),
    "zero-byte weights": (lambda c: AutoModel.from_pretrained(c.model(weights=b"")), "model.safetensors: .*too small"),
    "garbage for weights": (lambda c: AutoModel.from_pretrained(c.model(weights=b"x" * 99)), "model.safetensors: "),
    "no weights": (lambda c: AutoModel.from_pretrained(c.model(weights=None)), "no file named model.safetensors"),
    "other widths": (
        lambda c: AutoModel.from_pretrained(c.model(config=c.config(feature_size=20))), "model: expected weights of"
    ),
    "no image processor": (
        lambda c: AutoImageProcessor.from_pretrained(c.model(processor=None)), "preprocessor_config.json"
    ),
    "broken image processor": (lambda c: AutoImageProcessor.from_pretrained(c.model(processor=b"{")), "valid JSON"),
    "no teacher": (lambda c: load_teacher(c.folder), "teacher '.*"),
    "an APM for a teacher": (lambda c: load_teacher(c.saved), "got 'apm'"),
    "NaN coordinates": (lambda c: ask(torch.tensor([[0.0, np.nan]])), "coordinates: expected finite"),
    "infinite coordinates": (lambda c: ask(torch.tensor([[np.inf, 0.0]])), "coordinates: expected finite"),
    "coordinates in 3-D": (lambda c: ask(torch.zeros(4, 3)), r"coordinates: expected shape .*got \(4, 3\)"),
    "a list of coordinates": (lambda c: ask([[0.0, 0.0]]), "coordinates: expected a tensor, got list"),
    "a list of pixels": (lambda c: student()([1.0]), "pixel_values: expected a tensor, got list"),
    "pixels of another size": (lambda c: student()(torch.zeros(1, 3, 9, 9)), "pixel_values: expected shape"),
    # runs
    "NaN features": (lambda c: fit(c.folder / "o", teacher_like(broken=np.nan)), r"step 0: .*NaN .* images \[\d\]"),
    "infinite features": (lambda c: fit(c.folder / "o", teacher_like(broken=np.inf)), "step 0: .*features of the t"),
    "wide features": (lambda c: fit(c.folder / "o", teacher_like(width=20)), "feature_size: .* 20, got 16"),
    "images of another size": (lambda c: fit(c.folder / "o", teacher_like(side=9)), "pixel_values: expected shape"),
    "negative limit": (
        lambda c: DistillationConfig(output_dir="o", max_unreadable_images=-1),
        "max_unreadable_images: expected 0",
    ),
    "file for a folder": (lambda c: fit(c.file("out"), teacher_like()), "output_dir: cannot write to '.*out'"),
    "file in the way": (lambda c: fit(c.file("out") + "/run", teacher_like()), "output_dir: cannot write to"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_one_short_message_that_names_it(name, tmp_path, saved):
    bad, message = TABLE[name]
    with pytest.raises((ValueError, OSError), match="(?s)" + message) as caught:
        bad(Case(tmp_path, saved))
    text = str(caught.value)
    assert text.count("\n") < 3 and len(text) < 1500 and "object at 0x" not in text


def test_the_table_has_forty_entries():
    assert len(TABLE) >= 40


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(PNG)
    path.chmod(0)
    with pytest.raises(ValueError, match="row 7: .*secret.png': Permission denied"):
        collate(str(path))


# --- what is unusual and not bad -------------------------------------------------------------------------------------


def turned():
    exif = photo(0).getexif()
    exif[274] = 6
    return encoded(photo(0), "JPEG", exif=exif)


FRAMES = {"save_all": True, "append_images": [photo(1)] * 3}
UNUSUAL = {
    "1x1": encoded(PIL.Image.new("RGB", (1, 1))),
    "30,000 wide": encoded(PIL.Image.new("RGB", (30_000, 4))),
    "CMYK": encoded(photo(0).convert("CMYK"), "JPEG"),
    "palette": encoded(photo(0).convert("P")),
    "transparent": encoded(photo(0).convert("LA")),
    "16-bit": encoded(PIL.Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))),
    "float TIFF": float_tiff(0, 0.25, 1),
    "JPEG by the name of a PNG": {"bytes": JPEG, "path": "a.png"},
    "turned by its camera": turned(),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_read(name):
    pixels = collate(UNUSUAL[name], teacher_image_processor=PROCESSOR)["teacher_pixel_values"]
    assert pixels.shape == (1, 3, STUDENT_SIZE, STUDENT_SIZE) and pixels.isfinite().all()


def test_cameras_turn_pictures():
    assert decode_image(turned()).size == photo(0).size[::-1]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_moving_pictures_the_first_frame_is_read(kind):
    moving = encoded(photo(0), kind, **FRAMES)
    still, other = collate(encoded(photo(0), kind))["pixel_values"], collate(encoded(photo(1), kind))["pixel_values"]
    found = collate(moving)["pixel_values"]
    assert (found - still).abs().mean() < 0.2 < (found - other).abs().mean()


# --- skipping --------------------------------------------------------------------------------------------------------


def photos(num_images, *bad):
    rows = [{"image": {"bytes": encoded(photo(seed)), "path": None}} for seed in range(num_images)]
    for index in bad:
        rows[index] = {"image": {"bytes": JPEG[: 200 + index], "path": None}}
    return rows


def skip_run(folder, rows, clip, *, limit, validation=None, **settings):
    forget_accelerate()
    processor = matching_image_processor(clip, STUDENT_SIZE)
    settings = {"max_steps": 5, "batch_size": 2, "report_to": "none", "mixed_precision": "no", **settings}
    return distill(
        student(),
        numbered(rows),
        config=DistillationConfig(output_dir=str(folder), max_unreadable_images=limit, learning_rate=1e-2, **settings),
        image_processor=processor,
        teacher=clip,
        validation_data=None if validation is None else numbered(validation),
        collate_fn=ImageCollator(processor, teacher_image_processor=clip.image_processor, max_unreadable_images=limit),
    )


def skipped(folder):
    return [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]


def test_the_first_bad_image_stops_a_run_unless_told_otherwise(tmp_path, clip):
    with pytest.raises(ValueError, match="row 3: cannot decode"):
        skip_run(tmp_path, photos(6, 3), clip, limit=0)


def test_bad_images_are_skipped_listed_and_counted(tmp_path, clip):
    result = skip_run(tmp_path, photos(8, 1, 4, 6), clip, limit=5, validation=photos(3, 0), statistics_images=4)
    lines = skipped(tmp_path)
    assert {line["image"] for line in lines} == {"row 1", "row 4", "row 6", "validation row 0"}
    assert all("cannot decode" in line["reason"] for line in lines)
    assert result.metrics[-1]["skipped_images"] == 4
    assert all(values.isfinite().all() for values in result.student.state_dict().values())
    assert result.metrics[0]["feature_cosine"] != 0


def test_validation_figures_are_those_of_the_images_that_were_read(tmp_path, clip):
    good = photos(4)
    with_bad = skip_run(tmp_path / "a", good, clip, limit=2, validation=[*photos(1, 0), *good], max_steps=1)
    without = skip_run(tmp_path / "b", good, clip, limit=2, validation=good, max_steps=1)
    for name, value in without.metrics[-1].items():
        if name != "skipped_images":
            assert with_bad.metrics[-1][name] == pytest.approx(value, rel=1e-5), name


def test_a_batch_of_bad_images_alone_teaches_nothing(tmp_path, clip):
    before = {name: values.clone() for name, values in student().state_dict().items()}
    result = skip_run(tmp_path, photos(2, 0, 1), clip, limit=2, max_steps=2)
    assert all(torch.equal(values, before[name]) for name, values in result.student.state_dict().items())


def test_one_bad_image_beyond_the_limit_stops_the_run_and_is_named(tmp_path, clip):
    with pytest.raises(ValueError, match="row [146]: cannot decode|at most 2 unreadable images, got 3"):
        skip_run(tmp_path, photos(8, 1, 4, 6), clip, limit=2)


def test_the_limit_holds_for_all_processes_together(tmp_path, clip):
    """The loop's own limit, where no single process has seen more than it may."""
    processor = matching_image_processor(clip, STUDENT_SIZE)
    collator = ImageCollator(processor, teacher_image_processor=clip.image_processor, max_unreadable_images=9)
    config = DistillationConfig(
        output_dir=str(tmp_path), max_unreadable_images=1, report_to="none", max_steps=4, batch_size=2
    )
    with pytest.raises(
        ValueError, match="max_unreadable_images: expected at most 1 unreadable images, got 2, .*row [14]:"
    ):
        distill(
            student(), numbered(photos(6, 1, 4)), config=config, image_processor=processor, teacher=clip,
            collate_fn=collator,
        )  # fmt: skip


class Killed(Exception):
    pass


class Killing(list):
    """Rows, until `reads` of them have been read."""

    reads = 0

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads == 0:
            raise Killed
        return super().__getitem__(index)


def test_a_resumed_run_skips_the_same_and_ends_the_same(tmp_path, clip):
    rows, settings = photos(8, 1, 4, 6), {"limit": 3, "checkpoint_steps": 2, "max_steps": 6}
    whole = skip_run(tmp_path / "whole", rows, clip, **settings)
    killing = Killing(rows)
    killing.reads = 8  # in the fourth step, after the checkpoint of the second
    with pytest.raises(Killed):
        skip_run(tmp_path / "cut", killing, clip, **settings)
    resumed = skip_run(tmp_path / "cut", rows, clip, resume=True, **settings)
    assert skipped(tmp_path / "cut") == skipped(tmp_path / "whole") and len(skipped(tmp_path / "cut")) == 3
    for name, values in whole.student.state_dict().items():
        assert torch.equal(values, resumed.student.state_dict()[name]), name


def test_cropping_leaves_what_cannot_be_read_to_the_limit(tmp_path, clip):
    crops = RandomCrops(photos(4, 2), "image")
    batch = collate(crops[2]["image"], max_unreadable_images=1)
    assert problems(batch)[0].startswith("row 7: cannot decode")


def test_the_same_bad_image_counts_once():
    collator = ImageCollator(PROCESSOR, max_unreadable_images=1)
    for _ in range(3):
        assert collator([{"image": b"", "index": 3}, {"image": PNG, "index": 4}])["problem"].any(dim=1).tolist() == [
            True,
            False,
        ]
    with pytest.raises(ValueError, match="row 5"):
        collator([{"image": b"", "index": 5}])


def test_reasons_travel_as_tensors():
    texts = ["", "row 1: äöü", "x" * 1000]
    assert problems(torch.cat([packed(text) for text in texts])) == ["", "row 1: äöü", "x" * 384]


# --- streams ---------------------------------------------------------------------------------------------------------


class Flaky(IterableDataset):
    """Rows 0, 1, ...; `failures[row]` errors before that row is given."""

    def __init__(self, failures, error=None):
        self.failures, self.readings = dict(failures), 0
        self.error = error or ConnectionResetError("gone")

    def __iter__(self):
        self.readings += 1
        for row in range(6):
            if self.failures.get(row, 0):
                self.failures[row] -= 1
                raise self.error
            yield row


def test_a_stream_that_loses_its_network_loses_no_row():
    flaky = Flaky({2: 2, 5: 1})
    assert list(Reconnecting(flaky, name="photos", attempts=3, wait=0)) == list(range(6)) and flaky.readings == 4


def test_a_network_that_stays_away_is_one_error_that_says_how_to_go_on():
    flaky = Flaky({4: 99})
    with pytest.raises(ConnectionError, match="photos: .*after 4 rows .* 3 attempts .*gone.*--resume"):
        list(Reconnecting(flaky, name="photos", attempts=3, wait=0))
    assert flaky.readings == 3


def test_rows_that_cannot_be_read_are_not_asked_for_again():
    flaky = Flaky({1: 1}, ValueError("corrupt page"))
    with pytest.raises(ValueError, match="photos: row 1 of the stream cannot be read: corrupt page"):
        list(Reconnecting(flaky, name="photos", wait=0))
    assert flaky.readings == 1


def test_waits_double(monkeypatch):
    waits = []
    monkeypatch.setattr("apm_hf.data.streams.time.sleep", waits.append)
    assert len(list(Reconnecting(Flaky({0: 3}), name="photos", wait=0.5))) == 6 and waits == [0.5, 1, 2]


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("apm_hf.runs.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*results.json") as caught:
        write_atomically(path, "new")
    assert caught.value.errno == errno.ENOSPC and path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_under_the_weights_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    module = sys.modules["transformers.modeling_utils"]
    monkeypatch.setattr(module, "safe_save_file", full)
    with pytest.raises(OSError, match="cannot write the weights to .*model': .*No space left on device"):
        student().save_pretrained(tmp_path / "model")


def test_a_folder_that_cannot_be_written_to_is_refused_before_work(tmp_path, monkeypatch, clip):
    def read_only(self, _):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    monkeypatch.setattr(type(clip), "encode_images", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(OSError, match="output_dir: cannot write to .*: Read-only file system"):
        skip_run(tmp_path / "out", photos(2), clip, limit=0)


# --- what is not bad ------------------------------------------------------------------------------------------------


def test_options_of_transformers_are_still_taken(saved):
    config, unused = APMConfig.from_pretrained(
        saved, output_hidden_states=True, trust_remote_code=False, return_unused_kwargs=True, strange=1
    )
    assert config.output_hidden_states and unused["strange"] == 1
    model = AutoModel.from_pretrained(saved, dtype=torch.bfloat16, local_files_only=True, low_cpu_mem_usage=True)
    assert model.dtype == torch.bfloat16
