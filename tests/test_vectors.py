"""`apm embed`: the vectors of `APM.encode`, whatever the file, the interruptions and the photos in between."""

import errno
import json
import logging
import os
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open

from apm_hf import APM, APMImageProcessorPil, load_teacher
from apm_hf.commands.main import main
from apm_hf.distillation import matching_image_processor
from apm_hf.pair import vectors
from apm_hf.pair.vectors import write_vectors
from apm_hf.runs.identity import weights_digest
from apm_hf.runs.stopping import RunStopped
from fixtures_runs import forget_accelerate
from fixtures_tiny import FEATURE_SIZE, photo, save_clip, student

parquet = pytest.importorskip("pyarrow.parquet")

READABLE = ["a/one.png", "a/two.png", "b/three.jpg", "four.png", "zz.png"]
BROKEN = "a/broken.png"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_clip(folder / "clip")
    for seed, name in enumerate(READABLE):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(folder / "photos" / name)
    (folder / "photos" / BROKEN).write_bytes(b"<html>not found</html>")
    model = student(initializer_range=0.3)
    model.save_pretrained(folder / "apm")
    teacher = load_teacher(folder / "clip", device="cpu")
    matching_image_processor(teacher, model.config.image_size).save_pretrained(folder / "apm")
    return folder


@pytest.fixture(scope="module")
def apm(place):
    return APM.load(place / "apm", teacher=place / "clip", device="cpu")


@pytest.fixture
def photos(place):
    return [str(place / "photos" / name) for name in (*READABLE[:2], BROKEN, *READABLE[2:])]


def read(file):
    """Return paths, arrays by source, and facts, of any of the files."""
    if file.suffix == ".parquet":
        table = parquet.read_table(file)
        columns = {name: table[name].combine_chunks() for name in table.column_names if name != "path"}
        arrays = {name: column.flatten().to_numpy().reshape(len(column), -1) for name, column in columns.items()}
        return table["path"].to_pylist(), arrays, json.loads(table.schema.metadata[b"apm_hf"])
    facts = json.loads(file.with_suffix(".json").read_text())
    if file.suffix == ".npy":
        return facts["paths"], {facts["sources"][0]: np.load(file)}, facts
    with safe_open(file, framework="np") as tensors:
        return facts["paths"], {name: tensors.get_tensor(name) for name in tensors.keys()}, facts


@pytest.mark.parametrize(
    ("file", "source"),
    [("v.parquet", "both"), ("v.safetensors", "both"), ("v.npy", "teacher"), ("new/v.parquet", None)],
)
def test_a_folder_becomes_the_vectors_of_encode_with_relative_paths(place, apm, tmp_path, capfd, file, source):
    options = [] if source is None else ["--source", source]
    names = ["--model", str(place / "apm"), "--teacher", str(place / "clip")]
    status = main(["embed", str(place / "photos"), "--output", str(tmp_path / file), *names, *options, "--json"])
    printed = json.loads(capfd.readouterr().out)
    paths, arrays, facts = read(tmp_path / file)
    assert status == 1 and [one["photo"] for one in printed["errors"]] == [BROKEN]  # all others are there
    assert paths == ["a/one.png", "a/two.png", "b/three.jpg", "four.png", "zz.png"] and printed["photos"] == 5
    wanted = ["student", "teacher"] if source == "both" else [source or "student"]
    assert list(arrays) == facts["sources"] == printed["sources"] == wanted
    for name, values in arrays.items():
        expected = apm.encode([place / "photos" / path for path in paths], source=name)
        assert values.dtype == np.float32 and expected.std(dim=0).min() > 1e-3
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert facts["student"] == {"name": "apm", "sha256": weights_digest(apm.model)}
    assert facts["teacher"] == {"name": "clip", "sha256": weights_digest(apm.teacher.model)}
    assert facts["unreadable"] == printed["errors"] and str(place) not in json.dumps(facts)
    assert {path.name for path in (tmp_path / file).parent.iterdir()} <= {"v.json", (tmp_path / file).name}


def test_parquet_is_a_data_set_with_lists_of_one_length_in_row_groups_that_are_read_one_by_one(
    apm, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(vectors, "PART_PHOTOS", 2)
    write_vectors(apm, photos, tmp_path / "v.parquet", normalize=True)
    file = parquet.ParquetFile(tmp_path / "v.parquet")
    assert file.num_row_groups == 3 and file.metadata.num_rows == len(READABLE)
    assert file.schema_arrow.field("student").type.list_size == FEATURE_SIZE
    lengths = np.linalg.norm(read(tmp_path / "v.parquet")[1]["student"], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    data = pytest.importorskip("datasets").Dataset.from_parquet(
        str(tmp_path / "v.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert data.column_names == ["path", "student"] and len(data[0]["student"]) == FEATURE_SIZE


def counted(monkeypatch, *, stop_after=None):
    """Count the photos that are embedded; the process gets SIGTERM with the batch after so many."""
    rows, embed = [], APM.embed

    def embed_and_count(self, inputs, *, source=None):
        values = embed(self, inputs, source=source)
        rows.append(len(values))
        if stop_after is not None and sum(rows) >= stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(APM, "embed", embed_and_count)
    return rows


def test_what_was_stopped_goes_on_to_the_same_file_and_damaged_or_changed_parts_are_made_again(
    apm, photos, place, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(vectors, "PART_PHOTOS", 2)
    write_vectors(apm, photos, tmp_path / "whole.parquet", batch_size=1)
    target = tmp_path / "v.parquet"
    with monkeypatch.context() as patch:
        counted(patch, stop_after=3)
        with pytest.raises(RunStopped, match="SIGTERM after 4 of 6"):
            write_vectors(apm, photos, target, batch_size=1)
    parts = tmp_path / "v.parquet.parts"
    assert not target.exists() and len(list(parts.glob("parts/*.safetensors"))) == 2
    with pytest.raises(
        ValueError, match=r"another run in .*v.parquet.parts, which differs in normalized.*--overwrite"
    ):
        write_vectors(apm, photos, target, normalize=True)

    (parts / "run.json").rename(tmp_path / "run.json")
    with pytest.raises(ValueError, match="expected an empty folder or an earlier run to resume"):  # somebody's files
        write_vectors(apm, photos, target, batch_size=1, overwrite=False)
    (tmp_path / "run.json").rename(parts / "run.json")

    damaged = parts / "parts/00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    rows = counted(monkeypatch)
    with caplog.at_level(logging.INFO, logger="apm_hf"):
        made = write_vectors(apm, photos, target, batch_size=1)
    assert sum(rows) == 2 + 2  # the damaged part and the missing one; of the part between, one photo is broken
    assert "1 of 3 parts are there" in caplog.text and "damaged" in caplog.text
    assert target.read_bytes() == (tmp_path / "whole.parquet").read_bytes() and not parts.exists()
    assert [one["photo"] for one in made.unreadable] == [photos[2]]


def test_a_photo_that_changed_in_between_is_embedded_again_with_its_part(apm, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "PART_PHOTOS", 2)
    files = [str(tmp_path / f"{seed}.png") for seed in range(6)]
    for seed, file in enumerate(files):
        photo(seed).save(file)
    with monkeypatch.context() as patch:
        counted(patch, stop_after=4)
        with pytest.raises(RunStopped):
            write_vectors(apm, files, tmp_path / "v.npy", batch_size=2)
    photo(50).save(files[1])
    rows = counted(monkeypatch)
    write_vectors(apm, files, tmp_path / "v.npy", batch_size=2)
    assert sum(rows) == 4  # the first part again, and the last
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), apm.encode(files), rtol=1e-4, atol=1e-5)


def test_processes_that_read_photos_and_the_size_of_batches_change_nothing(apm, photos, tmp_path):
    one = write_vectors(apm, photos, tmp_path / "one.npy", batch_size=4)
    two = write_vectors(apm, photos, tmp_path / "two.npy", batch_size=4, num_workers=1)
    assert one.file.read_bytes() == two.file.read_bytes() and one.unreadable == two.unreadable
    write_vectors(apm, photos, tmp_path / "three.npy", batch_size=1)
    np.testing.assert_allclose(np.load(tmp_path / "three.npy"), np.load(one.file), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["embedding", "tokens"])
def test_a_student_that_reads_its_teacher_is_given_what_the_teacher_sees(apm, photos, tmp_path, source):
    model = student(trigger_source=source, initializer_range=0.3, image_size=32).eval()
    processor = APMImageProcessorPil(size={"height": 32, "width": 32})
    pair = APM(model, processor, apm.teacher)
    pictures = photos[:2]
    pixels = pair.preprocessing("student")["pixel_values"]([photo(0), photo(1)])
    with torch.no_grad():
        expected = model(pixels, trigger_column=pair.trigger_column([photo(0), photo(1)])).pooler_output
    assert expected.std(dim=0).min() > 1e-4
    write_vectors(pair, pictures, tmp_path / "v.npy", sources=["student"])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, rtol=1e-4, atol=1e-5)
    by_default = "teacher" if source == "tokens" else "student"  # a dense student has no embedding of its own
    assert write_vectors(pair, pictures, tmp_path / "u.npy").sources == [by_default]
    with pytest.raises(ValueError, match="trigger columns"):
        write_vectors(APM(model, processor, None), pictures, tmp_path / "w.npy")


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("v.csv", {}, "ends in .parquet, .npy, .safetensors, got"),
        ("v.npy", {"sources": ["student", "teacher"]}, "holds one array"),
        ("v.parquet", {"sources": ["students"]}, "expected some of student, teacher, got 'students'"),
        ("v.parquet", {"sources": ["student", "student"]}, "expected each once"),
        ("v.parquet", {"batch_size": 0}, "batch_size: expected a positive number"),
        ("there.parquet", {}, "there.parquet, which is there; --overwrite replaces it"),
        ("there.npy", {}, "there.json, which is there"),
    ],
)
def test_what_cannot_be_written_is_refused_before_work(apm, photos, tmp_path, monkeypatch, file, options, message):
    (tmp_path / "there.parquet").write_text("mine")
    (tmp_path / "there.json").write_text("mine")
    rows = counted(monkeypatch)
    with pytest.raises(ValueError, match=message):
        write_vectors(apm, photos, tmp_path / file, **options)
    assert not rows and sorted(path.name for path in tmp_path.iterdir()) == ["there.json", "there.parquet"]
    if file == "there.parquet":
        write_vectors(apm, photos, tmp_path / file, overwrite=True)
        assert len(read(tmp_path / file)[0]) == len(READABLE)


def test_unreadable_photos_alone_and_vectors_that_are_no_numbers_make_no_file(apm, place, photos, tmp_path):
    broken = str(place / "photos" / BROKEN)
    with pytest.raises(ValueError, match="readable photo, got 1 others; cannot decode"):
        write_vectors(apm, [broken], tmp_path / "v.parquet")
    model = student(initializer_range=0.3).eval()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"finite vectors of the student, got NaN or infinity in .*one.png"):
        write_vectors(APM(model, apm.image_processor, None), photos, tmp_path / "w.parquet")
    assert not (tmp_path / "v.parquet").exists() and not (tmp_path / "w.parquet").exists()


def test_a_full_disk_names_the_file_and_keeps_what_was_computed(apm, photos, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(vectors, "atomic_file", full)
        with pytest.raises(OSError, match=r"No space left on device.*v\.parquet"):
            write_vectors(apm, photos, tmp_path / "v.parquet")
    rows = counted(monkeypatch)
    write_vectors(apm, photos, tmp_path / "v.parquet")
    assert not rows and len(read(tmp_path / "v.parquet")[0]) == len(READABLE)


def test_names_that_are_no_text_are_written_as_text(apm, tmp_path):
    try:
        photo(1).save(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("a file system whose names are Unicode")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    write_vectors(apm, [name], tmp_path / "v.parquet", folder=tmp_path)
    assert read(tmp_path / "v.parquet")[0] == ["caf\\udce9.png"]
