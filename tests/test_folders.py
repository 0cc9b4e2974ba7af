"""A folder of n images is n images, whatever they are called; what is left out is said."""

import gc
import os
import warnings

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


def test_links_to_nothing_pipes_and_names_that_no_table_holds_are_left_out_by_name(tmp_path, caplog):
    folder = make(tmp_path / "photos", "0.jpg", "1.jpg")
    (folder / "gone.jpg").symlink_to("missing.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    latin = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")
    try:
        photo(2).save(latin)
    except OSError:  # of systems whose names are text
        latin = None
    with caplog.at_level("WARNING"):
        data = load_images(folder)
    assert names(data) == ["0.jpg", "1.jpg"]
    assert "3 images that are links to nothing, or no files: gone.jpg, loop.jpg, pipe.jpg" in caplog.text
    assert latin is None or "names are not UTF-8, which tables cannot hold: caf\\udce9.jpg" in caplog.text
    assert len(find_photos([str(folder)])) == 5 + (latin is not None)  # each says for itself what is wrong


@pytest.fixture
def unclosed():
    """`datasets` leaves files that describe images open, of which Python warns when they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.mark.usefixtures("unclosed")
def test_names_mean_nothing_where_images_are_described_and_what_is_not_described_is_said(tmp_path, caplog):
    folder = make(tmp_path / "photos [1]", "a.jpg", "steam train.jpg", "test tube.jpg", "more.jpg")
    (folder / "metadata.csv").write_text("file_name,note\na.jpg,x\nsteam train.jpg,y\ntest tube.jpg,z\n")
    data = load_images(folder)
    assert names(data) == ["a.jpg", "steam train.jpg", "test tube.jpg"] and "note" in data.dataset.features
    assert "left out 1 images that are not described: " in caplog.text and "more.jpg" in caplog.text


@pytest.mark.usefixtures("unclosed")
def test_described_splits_are_splits(tmp_path):
    for name in ("train", "test"):
        make(tmp_path / name, f"{name} 0.jpg", "other 1.jpg")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,note\n{name} 0.jpg,x\nother 1.jpg,y\n")
    assert names(load_images(tmp_path, split="test")) == ["other 1.jpg", "test 0.jpg"]


def test_images_beside_tables_are_refused_or_left_out_by_name(tmp_path, caplog):
    folder = make(tmp_path, "a.jpg", "test tube.jpg", "notes.parquet")
    with pytest.raises(ValueError, match="images or tables of them, got 2 images, as a.jpg, beside 1 tables .*notes"):
        load_images(folder)
    (folder / "a.jpg").unlink()
    (folder / "more.parquet").write_text("text")
    assert list_images(folder) is None
    assert "left out 1 images beside tables or archives: test tube.jpg" in caplog.text


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
    [
        "train",
        "test",
        "val",
        "cat",
        "dog",
        "a b",
        "line\nbreak",
        "\x1b[31m",
        "[x]",
        "Ünï",
        "*",
        "{y}",
        "%20",
        "-",
        "n01440764_tench",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    paths=st.sets(st.lists(WORDS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=8),
    links=st.sets(st.integers(0, 7)),
)
def test_every_image_is_in_just_one_split_whatever_folders_and_files_are_called(paths, links, tmp_path_factory):
    """Links to images are images, links to nothing are none, and links back to the folder add nothing."""
    root, outside = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("outside") / "image.jpg"
    outside.write_bytes(b"")
    for number, parts in enumerate(sorted(paths)):
        folder = root.joinpath(*[f"{part}" for part in parts[:-1]])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{parts[-1]}.{number}.jpg"
        if number in links:
            path.symlink_to(outside)
        else:
            path.write_bytes(b"")
        (folder / f"gone.{number}.jpg").symlink_to(root / "nothing")
        (folder / f"up.{number}").symlink_to(root)
    listed = list_images(root)
    found = [path for paths_of_split in listed.splits.values() for path in paths_of_split]
    assert len(found) == len(set(found)) == len(paths)
    if listed.class_names:
        assert all(len(listed.classes[split]) == len(files) for split, files in listed.splits.items())
