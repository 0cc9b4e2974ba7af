"""Teachers' features on the disk: written by anyone in any order to the same bytes, read as the teacher said them.

Children are forked from this process, which has imported everything; two ranks run under `torchrun`.
"""

import errno
import json
import logging
import os
import pickle
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from apm_hf import load_teacher
from apm_hf.commands.main import main
from apm_hf.data.augmentation import RandomCrops
from apm_hf.data.images import ImageCollator
from apm_hf.data.loading import train_and_validation
from apm_hf.distillation import DistillationConfig, matching_image_processor
from apm_hf.distillation import recipe as training
from apm_hf.distillation.losses import LossWeights
from apm_hf.distillation.objective import Objective
from apm_hf.distillation.targets import TargetMaker
from apm_hf.position_encoding import grid_coordinates
from apm_hf.runs.checksums import read_checksummed
from apm_hf.runs.identity import images_digest
from apm_hf.runs.processes import process_state
from apm_hf.runs.run import LOCK, Run
from apm_hf.runs.stopping import EXIT_STOPPED
from apm_hf.teachers.feature_cache import (
    CachedImages,
    CacheSettings,
    FeatureCache,
    estimate,
    write_feature_cache,
    writer,
)
from apm_hf.teachers.feature_cache.layout import VERIFIED
from apm_hf.teachers.targets import normalise_levels
from fixtures_runs import damaged_places, forget_accelerate, forked, processes, status_of
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, TEACHER_GRID, photo, save_clip, save_splits, student

datasets = pytest.importorskip("datasets")

NUM_IMAGES, PLACES = 11, TEACHER_GRID**2
STUDENT = {"image_size": 24, "patch_size": 8, "position_size": 16, "hidden_sizes": [32, 24], "rgb_hidden_sizes": [12]}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    level = logging.getLogger("apm_hf").level
    forget_accelerate()
    yield
    forget_accelerate()
    logging.getLogger("apm_hf").setLevel(level)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_clip(folder / "clip")
    save_splits(folder / "photos", num_train=NUM_IMAGES, num_validation=3)
    return folder


@pytest.fixture(scope="module")
def teacher(place):
    return load_teacher(place / "clip", device="cpu")


@pytest.fixture(scope="module")
def images():
    return [{"image": photo(seed)} for seed in range(NUM_IMAGES)]


def write(folder, teacher, images, *, batch_size=3, max_unreadable_images=0, num_workers=0, **settings):
    settings = {"dtype": "float32", "images_per_shard": 4, **settings}
    return write_feature_cache(
        folder,
        teacher,
        images,
        settings=CacheSettings(**settings),
        batch_size=batch_size,
        max_unreadable_images=max_unreadable_images,
        num_workers=num_workers,
    )


@pytest.fixture(scope="module")
def whole(teacher, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        write(folder, teacher, images)
    return folder


def contents_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in (LOCK, VERIFIED)}


# --- what is read ---------------------------------------------------------------------------------------------------


def test_rows_are_what_the_teacher_says(whole, teacher, images):
    cache = FeatureCache(whole).verify()
    assert len(cache) == NUM_IMAGES and len(list(whole.glob("*.safetensors"))) == 3
    for position in (0, 3, 4, 10):
        row, answer = cache[position], teacher.encode_images(images[position]["image"])
        torch.testing.assert_close(row["features"], answer.features[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(row["image_embeds"], answer.image_embeds[0], atol=1e-5, rtol=1e-5)
    apart = torch.stack([row["image_embeds"] for row in cache.__getitems__(range(NUM_IMAGES))]).diff(dim=0)
    assert apart.abs().amax(dim=1).min() > 0.1, "nothing to tell the images apart by"


def test_crops_are_rows_of_their_own_with_the_features_of_each(teacher, images, tmp_path):
    crops = RandomCrops(images, "image", seed=5, views=3)
    cache = write(tmp_path / "crops", teacher, crops)
    cache.check(teacher, images)
    rows = CachedImages(images, cache)
    assert len(rows) == 3 * NUM_IMAGES and rows.cache.views == 3
    for position in (0, 1, 4, 32):
        row, answer = rows[position], teacher.encode_images(crops[position]["image"])
        assert row["image"].tobytes() == crops[position]["image"].tobytes() and row["index"] == position
        torch.testing.assert_close(row["features"], answer.features[0], atol=1e-5, rtol=1e-5)
    first = torch.stack([rows[position]["image_embeds"] for position in range(3)])
    assert first.diff(dim=0).abs().amax(dim=1).min() > 0.01, "the crops of an image are the same"
    with pytest.raises(ValueError, match=r"number of images \(expected 10, got 11\)"):
        cache.check(teacher, images[:10])
    with pytest.raises(ValueError, match="images: expected a fixed number of views of each"):
        write(tmp_path / "endless", teacher, RandomCrops(images, "image"))
    with pytest.raises(ValueError, match="crops"):
        write(tmp_path / "crops", teacher, RandomCrops(images, "image", seed=6, views=3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_places_and_levels_are_those_of_the_grid_at_seeded_draws(teacher, images, tmp_path, dtype):
    kept = {"dtype": dtype, "num_locations": 5, "level_layers": [1, 2]}
    cache = write(tmp_path / "places", teacher, images[:5], **kept)
    draws = set()
    for position in range(5):
        row = cache[position]
        answer = teacher.encode_images(images[position]["image"], layers=[1, 2])
        places = row["locations"]
        draws.add(tuple(places.tolist()))
        assert places.dtype == torch.int64 and len(set(places.tolist())) == 5 and int(places.max()) < PLACES
        assert row["grid"].tolist() == [TEACHER_GRID, TEACHER_GRID] and row["features"].dtype == getattr(torch, dtype)
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.02, "rtol": 0.02}
        torch.testing.assert_close(row["features"].float(), answer.features[0].flatten(0, 1)[places], **close)
        levels = normalise_levels(answer.levels[0]).flatten(1, 2)[:, places]
        torch.testing.assert_close(row["levels"].float(), levels, **close)
    assert len(draws) > 1, "every image has places of its own"
    again = write(tmp_path / "again", teacher, images[:5], batch_size=5, **kept)
    assert all(torch.equal(again[row]["locations"], cache[row]["locations"]) for row in range(5))
    other = write(tmp_path / "other", teacher, images[:5], seed=1, **kept)
    assert any(not torch.equal(other[row]["locations"], cache[row]["locations"]) for row in range(5))


def test_it_is_joined_with_its_images_in_any_order_and_process(whole, images):
    data = pickle.loads(pickle.dumps(CachedImages(images, FeatureCache(whole))))
    data[0]
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    loader = DataLoader(data, batch_size=4, sampler=order, num_workers=2, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    assert [row["index"] for row in rows] == order
    for row, position in zip(rows, order, strict=True):
        assert row["image"].tobytes() == images[position]["image"].tobytes()
        assert torch.equal(row["features"], FeatureCache(whole)[position]["features"])


def test_writing_into_a_row_leaves_the_files_alone(whole):
    cache = FeatureCache(whole)
    cache[0]["features"].fill_(7)
    assert FeatureCache(whole).verify()[0]["features"].abs().max() < 7


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_is_refused_with_all_that_differs(whole, teacher, images, place):
    cache = FeatureCache(whole)
    cache.check(teacher, images)
    with pytest.raises(ValueError, match=r"does not fit, .*number of images \(expected 10, got 11\)"):
        cache.check(teacher, images[:-1])
    others = [images[1], images[0], *images[2:]]
    with pytest.raises(ValueError, match="does not fit, it has other images"):
        cache.check(teacher, others)
    with pytest.raises(ValueError, match=r"level_layers \(expected \[1\], got \[\]\)"):
        cache.check(teacher, images, level_layers=[1])
    other = load_teacher(place / "clip", device="cpu")
    other.name, other.image_processor.size = "another/one", {"shortest_edge": 36}
    other.feature_size = 20
    with pytest.raises(ValueError) as refused:
        cache.check(other, images)
    for part in (
        "teacher.name (expected another/one, got clip)",
        "feature_size (expected 20, got 16)",
        "size.shortest",
    ):
        assert part in str(refused.value) and "\n" not in str(refused.value)
    tuned = load_teacher(place / "clip", device="cpu")
    next(tuned.model.parameters()).data += 1e-3
    with pytest.raises(ValueError, match=r"other teacher.weights$"):
        cache.check(tuned, images)
    cache.check(load_teacher(place / "clip", device="cpu", dtype="bfloat16"), images)


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.json", "run.json", "index.json"])
def test_a_flipped_byte_in_any_file_is_detected_and_mended(whole, teacher, images, tmp_path, name, caplog):
    for file, content in contents_of(whole).items():
        (tmp_path / file).write_bytes(content)
    flip(tmp_path / name)
    if name.endswith("safetensors"):
        cache = FeatureCache(tmp_path)  # by its size alone nothing is to be seen
        assert len(cache) == NUM_IMAGES
        with pytest.raises(ValueError, match=rf"{name}: expected SHA-256 \w+\.\.\., found \w+"):
            cache[5]
    elif name == "index.json":
        with pytest.raises(ValueError, match=f"feature_cache: .*{name}: expected text that fits its checksum"):
            FeatureCache(tmp_path)
    if name == "run.json":
        with pytest.raises(ValueError, match=f"{name}: expected text that fits its checksum"):
            write(tmp_path, teacher, images)
        return
    write(tmp_path, teacher, images)
    assert contents_of(tmp_path) == contents_of(whole)
    assert ("00001.json is damaged and computed again" in caplog.text) == name.startswith("00001")


def test_damage_to_any_file_of_a_cache_is_found_by_who_reads_it(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "cache")
    FeatureCache(folder).verify()
    run, index = Run(folder, process_state(), parts="."), read_checksummed(folder / "index.json")
    identity = read_checksummed(folder / "run.json")["identity"]
    for path in damaged_places([path for path in folder.iterdir() if path.name != LOCK]):
        if path.name == "run.json":
            with pytest.raises(ValueError, match=path.name):
                run.claim(identity)
        elif path.name == VERIFIED:  # all is read again
            assert FeatureCache(folder).verify().index == index
        elif path.suffix == ".json" and path.name != "index.json":  # the reader has all of it from the index
            assert run.load(path.stem) is None
            assert FeatureCache(folder).verify().index == index
        else:
            with pytest.raises(ValueError, match=path.name):
                FeatureCache(folder).verify()
    FeatureCache(folder).verify()


def test_a_file_is_read_once_until_its_size_or_time_changes(whole, tmp_path):
    folder, name = shutil.copytree(whole, tmp_path / "cache"), "00001.safetensors"
    FeatureCache(folder).verify()
    facts = (folder / name).stat()
    flip(folder / name)
    with pytest.raises(ValueError, match=f"{name}: expected SHA-256"):
        FeatureCache(folder)[5]
    os.utime(folder / name, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    FeatureCache(folder).verify()[5]
    with pytest.raises(ValueError, match=f"{name}: expected SHA-256"):
        FeatureCache(folder).verify(again=True)
    flip(folder / name)
    folder.chmod(0o500)
    try:
        FeatureCache(folder).verify()
    finally:
        folder.chmod(0o700)


def test_truncated_missing_and_broken_shards_are_named(whole, tmp_path):
    for file, content in contents_of(whole).items():
        (tmp_path / file).write_bytes(content)
    path = tmp_path / "00001.safetensors"
    flip(path, 9)  # of the header, which its size does not tell
    with pytest.raises(ValueError, match="00001.safetensors: .*verifies it and writes again"):
        FeatureCache(tmp_path)[5]
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=f"00001.safetensors: expected {size} bytes, found {size - 1}"):
        FeatureCache(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="00001.safetensors: expected a file, found No such"):
        FeatureCache(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="expected a folder with index.json, got .*half written"):
        FeatureCache(tmp_path)


def test_another_cache_or_other_files_in_the_folder_are_refused(whole, teacher, images, tmp_path):
    before = contents_of(whole)
    with pytest.raises(ValueError, match=r"which differs in settings.dtype \(expected bfloat16, got float32\)"):
        write(whole, teacher, images, dtype="bfloat16")
    assert contents_of(whole) == before
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="expected an empty folder or an earlier run to resume"):
        write(tmp_path, teacher, images)


def test_answers_beyond_a_dtype_are_refused(teacher, images, tmp_path, monkeypatch):
    answer = type(teacher).encode_images

    def large(self, *inputs, **options):
        output = answer(self, *inputs, **options)
        output.features[-1] *= 1e6
        return output

    monkeypatch.setattr(type(teacher), "encode_images", large)
    with pytest.raises(ValueError, match=r"dtype: expected features that float16 can hold, .* for rows \[2\]; use bf"):
        write(tmp_path / "half", teacher, images, dtype="float16")
    write(tmp_path / "wide", teacher, images, dtype="bfloat16")


def test_an_answer_that_is_no_number_names_its_rows(teacher, images, tmp_path, monkeypatch):
    encode = teacher._vision.encode

    def broken(*inputs):
        targets = encode(*inputs)
        targets["features"][0] = float("nan")
        return targets

    monkeypatch.setattr(teacher._vision, "encode", broken)
    with pytest.raises(ValueError, match="rows 0 to 2: .*features of teacher"):
        write(tmp_path, teacher, images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of .*'bfloat16'.*, got 'int8'"),
        ({"num_locations": 0}, "num_locations: expected a positive number or None, got 0"),
        ({"num_locations": 17}, "num_locations: expected at most the teacher's 4 x 4 patches, got 17"),
        ({"images_per_shard": 0}, "images_per_shard: expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(teacher, images, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, teacher, images, **settings)


# --- what is survived -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(12))
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(whole, teacher, images, tmp_path, moment, monkeypatch):
    """A file is brought to the disk, then renamed: plan, three shards with their notes, index; eight files."""
    calls, replace, fsync = [], os.replace, os.fsync

    def counted(function):
        def change(*inputs):
            calls.append(inputs)
            if len(calls) == 2 * moment + 1:
                os._exit(9)
            return function(*inputs)

        return change

    def killed():
        os.replace, os.fsync = counted(replace), counted(fsync)
        write(tmp_path / "cache", teacher, images)

    status = status_of(forked(killed))
    assert status == (9 if moment < 10 else status) and status in (0, 9)
    left = contents_of(tmp_path / "cache")
    assert not any(name.endswith(".safetensors") and left[name] != contents_of(whole)[name] for name in left)
    written, answer = [], type(teacher).encode_images
    monkeypatch.setattr(type(teacher), "encode_images", lambda *a, **b: written.append(1) or answer(*a, **b))
    write(tmp_path / "cache", teacher, images)
    assert {name: data for name, data in contents_of(tmp_path / "cache").items() if name[0] != "."} == contents_of(
        whole
    )
    num_whole = sum(name in left for name in ("00000.json", "00001.json", "00002.json"))
    assert len(written) == sum((2, 2, 1)[num_whole:]), "only what is missing is computed"


def test_asked_to_stop_it_keeps_whole_shards_and_ends_with_a_status_of_its_own(whole, teacher, images, tmp_path):
    answer, told = type(teacher).encode_images, []

    def stopped():
        def asked(self, *inputs, **options):
            told.append(1)
            if len(told) == 3:  # in the second shard
                os.kill(os.getpid(), signal.SIGTERM)
            return answer(self, *inputs, **options)

        type(teacher).encode_images = asked
        write(tmp_path, teacher, images)

    assert status_of(forked(stopped)) == EXIT_STOPPED
    assert [path.name for path in sorted(tmp_path.glob("0*"))] == ["00000.json", "00000.safetensors"]
    write(tmp_path, teacher, images)
    assert contents_of(tmp_path) == contents_of(whole)


def test_a_full_disk_is_one_line(place, teacher, images, tmp_path, monkeypatch, caplog):
    """Known before, or found out while writing."""
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 5000))
        with pytest.raises(ValueError, match=r"output_dir: expected 1.8\d+e-05 GB free .* got 5e-06 GB; keep fewer"):
            write(tmp_path, teacher, images)
    fsync = os.fsync

    def full(descriptor):
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(flags(place, tmp_path / "full")) == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage().startswith("apm cache-features: the disk is full")
    assert not list((tmp_path / "full").glob("*.safetensors"))


def test_bad_images_are_listed_and_left_out_up_to_a_limit(teacher, images, tmp_path):
    rows = [dict(row) for row in images]
    rows[2]["image"] = rows[5]["image"] = b"junk"
    cache = write(tmp_path / "cache", teacher, rows, max_unreadable_images=2)
    assert [bad["row"] for bad in cache.index["bad"]] == [2, 5] and "cannot decode" in cache.index["bad"][0]["reason"]
    data = CachedImages(rows, cache)
    assert len(data) == 9 and [data[position]["index"] for position in range(9)] == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    for row in (data[2], data[4], data[8]):
        answer = teacher.encode_images(row["image"])
        torch.testing.assert_close(row["features"], answer.features[0], atol=1e-5, rtol=1e-5)
    # One to a shard: no shard's writer has too many, all together do.
    with pytest.raises(
        ValueError, match="max_unreadable_images: expected at most 1 unreadable images, got 2, .* row 5: cannot"
    ):
        write(tmp_path / "cache", teacher, rows, max_unreadable_images=1)
    with pytest.raises(ValueError, match="row 2: cannot decode"):
        write(tmp_path / "none", teacher, rows)
    with pytest.raises(ValueError, match="expected a folder with index.json"):
        FeatureCache(tmp_path / "none")


# --- the command, and distillations from what it made ---------------------------------------------------------------


def flags(place, folder, *more):
    words = ["cache-features", "--teacher", place / "clip", "--dataset", place / "photos", "--output_dir", folder]
    return [str(word) for word in (*words, "--images_per_shard", 4, "--dtype", "float32", "--batch_size", 3, *more)]


def test_two_ranks_write_the_files_that_one_does(place, tmp_path, monkeypatch):
    assert main(flags(place, tmp_path / "one")) == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    written, save = [], writer._Writer._save

    def remembered(self, number, *inputs):
        written.append(number)
        save(self, number, *inputs)

    monkeypatch.setattr(writer._Writer, "_save", remembered)

    def work(rank):
        forget_accelerate()
        known = process_state().num_processes
        assert main(flags(place, tmp_path / "two")) == 0
        (tmp_path / f"two.{rank}").write_text(f"{known} {written}")

    assert processes(2, work) == [0, 0]
    assert [(tmp_path / f"two.{rank}").read_text() for rank in (0, 1)] == ["2 [0, 2]", "2 [1]"]
    one, two = contents_of(tmp_path / "one"), contents_of(tmp_path / "two")
    assert one.keys() == two.keys() and not [name for name in one if one[name] != two[name]]


def test_the_command_says_what_it_takes_and_verifies(place, tmp_path, capsys, teacher):
    folder = tmp_path / "cache"
    assert main(flags(place, folder, "--dry_run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not folder.exists() and (plan["images"], plan["shards"]) == (NUM_IMAGES, 3)
    assert main(flags(place, folder, "--json")) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["images"] == NUM_IMAGES and 0.5 * plan["bytes"] < made["bytes"] <= plan["bytes"]
    per_image = estimate(teacher, NUM_IMAGES, CacheSettings(dtype="float32")).bytes_per_image
    held = load_file(folder / "00000.safetensors")
    assert sum(values.nbytes for values in held.values()) == 4 * per_image
    assert main(["cache-features", "--output_dir", str(folder), "--verify"]) == 0
    flip(folder / "00001.safetensors")
    assert main(["cache-features", "--output_dir", str(folder), "--verify"]) == 1
    assert main(["cache-features", "--output_dir", str(folder)]) == 1  # neither teacher nor data


def losses_of(rows, teacher, place, *, num_locations=None, layers=None, **options):
    """Of all images as one batch, asked at the same draw of places."""
    processor = matching_image_processor(teacher, STUDENT_SIZE)
    collator = ImageCollator(processor, teacher_image_processor=teacher.image_processor)
    batch = collator([rows[position] for position in range(len(rows))])
    assert ("teacher_pixel_values" in batch) != ("features" in batch)
    model = student(**options)
    objective = Objective(
        model.config, TargetMaker(teacher, processor, layers=layers), LossWeights(), num_locations=num_locations
    )
    return batch, model, objective, objective.losses(model, batch, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_locations", [None, 6])
def test_losses_from_a_cache_are_those_without(whole, teacher, images, place, num_locations):
    *_, live = losses_of(images, teacher, place, num_locations=num_locations)
    *_, cached = losses_of(CachedImages(images, FeatureCache(whole)), teacher, place, num_locations=num_locations)
    assert set(live) == set(cached) == {"loss", "loss_grid", "loss_cls", "loss_rgb"}
    for name, loss in live.items():
        assert loss > 1e-3 and abs(loss - cached[name]) < 1e-5 * loss, name


def test_losses_at_kept_places_are_the_live_ones_at_the_same_places(teacher, images, place, tmp_path):
    cache = write(tmp_path, teacher, images, num_locations=5, level_layers=[2])
    student_levels = {"num_levels": 1, "level_size": 16}
    batch, model, objective, cached = losses_of(
        CachedImages(images, cache), teacher, place, layers=[2], **student_levels
    )
    live_batch, _, live, _ = losses_of(images, teacher, place, layers=[2], **student_levels)
    main, _ = live.head_targets(live_batch)
    assert torch.equal(batch["pixel_values"], live_batch["pixel_values"])
    coordinates, targets = grid_coordinates(TEACHER_GRID, TEACHER_GRID), main
    errors = {"grid": [], "rgb": [], "level": []}
    for row in range(NUM_IMAGES):  # one image after the other, with no cache
        places = cache[row]["locations"]
        outputs = model(batch["pixel_values"][row : row + 1], coordinates[places])
        errors["grid"].append((outputs.last_hidden_state[0] - targets.features[row, places]).square().mean())
        errors["rgb"].append((outputs.rgb[0] - targets.rgb[row, places]).square().mean())
        errors["level"].append((outputs.levels[0] - targets.levels[row, places]).square().mean())
    for name, each in errors.items():
        expected = torch.stack(each).mean()
        assert abs(cached[f"loss_{name}"] - expected) < 1e-4 * expected, name
    # Another draw of the cached locations: fewer of them, other losses.
    objective.num_locations = 2
    fewer = objective.losses(model, batch, torch.Generator().manual_seed(0))
    assert fewer["loss_grid"].isfinite() and abs(fewer["loss_grid"] - cached["loss_grid"]) > 1e-4


def distil(place, folder, *, cache=None, **settings):
    forget_accelerate()
    chosen = {
        "dataset": str(place / "photos"),
        "teacher": str(place / "clip"),
        "preset": "tiny",
        "config_overrides": json.dumps(STUDENT),
    }
    config = {"max_steps": 4, "batch_size": 4, "report_to": "none", "learning_rate": 1e-2, "mixed_precision": "no"}
    names = {field for field in training.TrainingConfig.__dataclass_fields__}
    chosen |= {name: value for name, value in settings.items() if name in names}
    config |= {name: value for name, value in settings.items() if name not in names}
    return training.train(
        training.TrainingConfig(**chosen, feature_cache=cache and str(cache)),
        DistillationConfig(output_dir=str(folder), num_pictures=0, **config),
        command="apm distill",
    ).distillation


def test_a_distillation_from_a_cache_is_the_one_without_and_asks_no_teacher(place, tmp_path, monkeypatch, caplog):
    data, _ = train_and_validation(place / "photos")
    teacher = load_teacher(place / "clip", device="cpu")
    write(tmp_path / "cache", teacher, data.dataset)
    monkeypatch.setattr(training, "_draw_card_picture", lambda *inputs: None)  # it takes longer than all of this
    live = distil(place, tmp_path / "live", statistics_images=8)
    asked, answer = [], type(teacher).encode_images

    def counted(self, *inputs, **options):
        asked.append(len(options["pixel_values"]))
        return answer(self, *inputs, **options)

    monkeypatch.setattr(type(teacher), "encode_images", counted)
    cached = distil(place, tmp_path / "cached", cache=tmp_path / "cache", statistics_images=8)
    assert asked == [3, 3, 3], "about validation images alone: for controls, at the beginning and at the end"
    assert live.metrics[0]["feature_cosine"] != live.metrics[-1]["feature_cosine"]
    first, second = (dict(one.student.state_dict()) for one in (live, cached))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
    write(tmp_path / "places", teacher, data.dataset, num_locations=6, dtype="bfloat16")
    some = distil(place, tmp_path / "some", cache=tmp_path / "places", num_locations=4, checkpoint_steps=3)
    assert some.metrics[-1]["feature_cosine"] > some.metrics[0]["feature_cosine"]
    distil(place, tmp_path / "some", num_locations=4, resume=True)
    assert "goes on otherwise than it began: feature_cache {'dtype': 'bfloat16'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"random_crops": True},
            "--random_crops: expected none with --feature_cache, which holds fixed views",
        ),
        ({"jitter": True}, "--jitter: expected none with --feature_cache"),
        ({"streaming": True}, "--feature_cache: expected a data set that is not streamed"),
        ({"max_images": 7}, r"number of images \(expected 7, got 11\)"),
        ({"extra_teachers": ["more=CLIP"]}, "expected complete grids beside additional teachers, got some locations"),
    ],
)
def test_what_a_cache_cannot_do_is_said(place, whole, teacher, tmp_path, settings, message):
    cache = whole
    if "extra_teachers" in settings:
        data, _ = train_and_validation(place / "photos")
        write(cache := tmp_path / "places", teacher, data.dataset, num_locations=6)
        settings = {"extra_teachers": [f"more={place / 'clip'}"]}
    with pytest.raises(ValueError, match=message):
        distil(place, tmp_path / "run", cache=cache, **settings)


def test_the_fingerprint_depends_on_contents_not_on_places(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photo(1).save(tmp_path / name / "x.png")
    rows = {name: [{"image": str(tmp_path / name / "x.png")}] for name in ("a", "b")}
    rows["bytes"] = [{"image": {"bytes": (tmp_path / "a/x.png").read_bytes(), "path": "elsewhere.png"}}]
    found = {name: images_digest(row, "image") for name, row in rows.items()}
    assert len(set(found.values())) == 1
    assert images_digest([{"image": Image.new("RGB", (2, 2))}], "image") not in found.values()
    assert Path(tmp_path / "a/x.png").exists() and FEATURE_SIZE == 16
