"""The teacher of photos that ships inside the package: small, loadable, right about held-out photos."""

import importlib
import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel

from apm_hf import APM
from apm_hf.assets import PHOTO_TEACHER
from apm_hf.data.sample_photos import sample_photos

ROOT = Path(__file__).resolve().parents[1]
CALTECH = ROOT.parent / "shared" / "data" / "caltech101"
NUM_TESTED = 60


@pytest.fixture(scope="module")
def pair():
    return APM.load(teacher=PHOTO_TEACHER, device="cpu")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_photo_teacher")
    sys.path.remove(str(ROOT / "scripts"))


def test_the_folder_is_small_and_loads_as_any_model_does():
    assert sum(path.stat().st_size for path in Path(PHOTO_TEACHER).iterdir()) < 6_000_000
    assert "Caltech-101" in (Path(PHOTO_TEACHER) / "README.md").read_text()
    assert {parameter.dtype for parameter in AutoModel.from_pretrained(PHOTO_TEACHER).parameters()} == {torch.float32}


def test_the_names_of_the_classes_come_with_the_teacher_and_are_words_it_knows(pair, script):
    names = [words[0] for words in script.CLASS_WORDS.values()]
    assert pair.default_labels == names and len(names) == 100
    every = [word for words in script.CLASS_WORDS.values() for word in words]
    assert pair.teacher.unknown_labels([*every, *script.EVERYDAY_WORDS]) == []
    assert pair.teacher.unknown_labels(["accordion", "samovar"]) == ["samovar"]


def test_synonyms_are_closer_to_their_own_name_than_to_most_others(pair, script):
    names = pair.teacher.encode_text(pair.default_labels)
    synonyms, own = zip(
        *[(words[1], row) for row, words in enumerate(script.CLASS_WORDS.values()) if words[1:]], strict=True
    )
    nearest = (pair.teacher.encode_text(list(synonyms)) @ names.T).argmax(dim=1)
    assert (nearest == torch.tensor(own)).float().mean() > 0.8


def test_held_out_photos_are_named_right(pair, script):
    if not CALTECH.is_dir():
        pytest.skip(f"needs Caltech-101 at {CALTECH}")
    test = script.load_parts(str(CALTECH))["test"]
    rows = range(0, len(test), len(test) // NUM_TESTED)
    images, labels = [test.images(slice(row, row + 1))[0] for row in rows], test.labels[list(rows)]
    texts = pair.teacher.encode_text(test.class_names)

    found = (pair.encode(images) @ texts.T).argmax(dim=1)
    assert (found == labels).float().mean() > 0.4  # chance is 0.01


def test_the_split_depends_on_contents_alone(script, tmp_path):
    """Rows in another order, and one twice: the same photos are held out, ten of a class and then three."""
    datasets = pytest.importorskip("datasets")
    names = [script.BACKGROUND, "ant", "chair"]
    files = []
    for row in range(45):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (row, 0, 0)).save(file, "PNG")
        files.append((file.getvalue(), row % 3))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    parts = []
    for number, order in enumerate((files, [files[7], *reversed(files)])):
        columns = {"image": [{"bytes": file, "path": None} for file, _ in order], "label": [one for _, one in order]}
        folder = tmp_path / str(number)
        folder.mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
        parts.append(script.load_parts(str(folder)))
    for name, size in (("test", 20), ("watched", 6), ("train", 19)):
        assert parts[0][name].files == parts[1][name].files and len(parts[0][name]) == size
    assert (parts[0]["train"].labels == -1).sum() == 15 and not set(parts[0]["test"].files) & set(
        parts[0]["train"].files
    )


def test_sample_photos_are_those_of_two_libraries_and_no_file_of_this_package():
    pytest.importorskip("skimage")
    photos = sample_photos()
    assert set(photos) == {"astronaut", "chelsea", "coffee", "rocket", "china", "flower"}
    assert all(photo.mode == "RGB" and min(photo.size) >= 300 for photo in photos.values())
    assert not [path for path in (ROOT / "src").rglob("*") if path.suffix in (".jpg", ".jpeg")]
