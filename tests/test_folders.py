"""A folder of n images is n images, whatever they are called; what is left out is said."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apm_hf.data.folders import find_photos, list_images
from apm_hf.data.loading import load_images, train_and_validation
from fixtures_tiny import photo

pytest.importorskip("datasets")


def make(root, *names):
    """Write a small image, or for other suffixes a text, under every name."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".png"):
            photo(number).save(path)
        else:
            path.write_text("text")
    return root


def names(data):
    return sorted(os.path.basename(row["image"]["path"]) for row in data.dataset)


@pytest.mark.parametrize(
    "files",
    [
        ("a.jpg", "b.jpg", "steam train.jpg", "test tube.jpg"),
        ("train.jpg", "validation.png", "test-00000-of-00001.jpg"),
        ("[2024].jpg", "a*.jpg", "b?.png", "{c}.jpg", "d\n.png"),
        ("A.JPG", "deep/er/b.png", "deep/c.jpg"),
    ],
    ids=["words", "splits", "patterns", "depths"],
)
def test_names_of_files_mean_nothing(tmp_path, files):
    data = load_images(make(tmp_path / "photos [2024]", *files))
    assert names(data) == sorted(os.path.basename(name) for name in files)
    assert data.split == "train"


def test_a_class_may_be_called_like_a_split(tmp_path):
    data = load_images(make(tmp_path, "car/0.jpg", "train/1.jpg", "train/2.jpg", "plane/deep/3.jpg"))
    assert data.class_names == ["car", "plane", "train"] and len(data.dataset) == 4
    assert [data.class_names[row["label"]] for row in data.dataset] == ["car", "plane", "train", "train"]


def test_splits_without_classes_have_no_labels(tmp_path):
    folder = make(tmp_path, "train/0.jpg", "train/1.jpg", "test/2.jpg")
    train, validation = train_and_validation(folder)
    assert names(train) == ["0.jpg", "1.jpg"] and names(validation) == ["2.jpg"]
    assert train.label_column is validation.label_column is None
    with pytest.raises(ValueError, match="found no labels .*: labelled images lie in a folder for each class"):
        validation.require_labels()


def test_a_folder_that_stands_alone_is_a_split_only_when_it_is_asked_for(tmp_path):
    folder = make(tmp_path, "test/0.jpg", "test/1.jpg")
    assert load_images(folder).split == "train" and load_images(folder, split="test").split == "test"
    assert names(load_images(folder)) == names(load_images(folder, split="test")) == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_that_hold_classes_are_splits(tmp_path, streaming):
    folder = make(tmp_path, "training/cat/0.jpg", "training/dog/1.jpg", "val/cat/2.jpg", "val/dog/3.jpg")
    train, validation = train_and_validation(folder, streaming=streaming)
    assert names(train) == ["0.jpg", "1.jpg"] and names(validation) == ["2.jpg", "3.jpg"]
    assert train.class_names == validation.class_names == ["cat", "dog"]
    assert (train.split, validation.split) == ("train", "validation")
    if not streaming:
        assert names(load_images(folder, split="train[:1]+validation")) == ["0.jpg", "2.jpg", "3.jpg"]


def test_links_are_followed_once_and_litter_is_skipped(tmp_path, caplog):
    folder = make(tmp_path / "photos", "cat/0.jpg", "dog/1.jpg", ".hidden.jpg", "cat/.thumb/2.jpg", "__MACOSX/3.jpg",
                  "Thumbs.db", "notes.txt", "new.heic")  # fmt: skip
    elsewhere = make(tmp_path / "elsewhere", "4.jpg", "5.jpg")
    (folder / "bird").symlink_to(elsewhere)
    (folder / "cat/again").symlink_to(folder)
    with caplog.at_level("INFO"):
        data = load_images(folder)
    assert names(data) == ["0.jpg", "1.jpg", "4.jpg", "5.jpg"] and data.class_names == ["bird", "cat", "dog"]
    assert "left out 1 images of a format that cannot be read here: new.heic" in caplog.text
    assert "left out 1 files that are no images: notes.txt" in caplog.text


def test_images_beside_folders_have_no_classes_and_it_is_said(tmp_path, caplog):
    data = load_images(make(tmp_path, "0.jpg", "cat/1.jpg", "dog/2.jpg"))
    assert len(data.dataset) == 3 and data.label_column is None
    assert "both in the folder and in folders below it" in caplog.text


def test_a_folder_that_stands_alone_is_no_class(tmp_path):
    data = load_images(make(tmp_path, "photos/cat/0.jpg", "photos/dog/1.jpg"))
    assert data.class_names == ["cat", "dog"]
    assert load_images(make(tmp_path / "other", "all/0.jpg", "all/1.jpg")).label_column is None


def test_photos_are_files_folders_and_patterns_each_once(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg", "b.png", "more/c.jpg", "more/deep/d.jpg", "notes.txt", "[1].jpg")
    monkeypatch.chdir(tmp_path)
    assert find_photos(["b.png", "more", "*.jpg"]) == ["b.png", "more/c.jpg", "more/deep/d.jpg", "[1].jpg", "a.jpg"]
    assert find_photos(["[1].jpg", "more/**/*.jpg"]) == ["[1].jpg", "more/c.jpg", "more/deep/d.jpg"]
    assert find_photos(["nothing.jpg", "nothing*.jpg"]) == ["nothing.jpg", "nothing*.jpg"]


def test_a_damaged_image_stays_a_row(tmp_path):
    make(tmp_path, "0.jpg", "1.jpg")
    (tmp_path / "1.jpg").write_bytes(b"junk")
    assert len(load_images(tmp_path).dataset) == 2


WORDS = st.sampled_from(
    ["train", "test", "val", "cat", "dog", "a b", "[x]", "Ünï", "*", "{y}", "%20", "-", "n01440764_tench"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.sets(st.lists(WORDS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=8))
def test_every_image_is_in_just_one_split_whatever_folders_and_files_are_called(paths, tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for number, parts in enumerate(sorted(paths)):
        folder = root.joinpath(*[f"{part}" for part in parts[:-1]])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{parts[-1]}.{number}.jpg").write_bytes(b"")
    listed = list_images(root)
    found = [path for paths_of_split in listed.splits.values() for path in paths_of_split]
    assert len(found) == len(set(found)) == len(paths)
    if listed.class_names:
        assert all(len(listed.classes[split]) == len(files) for split, files in listed.splits.items())
