"""Streams: every process reads its own shards, nothing is lost or seen twice, and runs go on with the same batches.

Two processes are forked from this one, which has imported everything.
"""

import collections
import functools
import io
import os
import tarfile

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from apm_hf import load_teacher
from apm_hf.data import split_streams
from apm_hf.data.images import ImageCollator, decode_image
from apm_hf.data.loading import load_images, train_and_validation
from apm_hf.data.split_streams import PLACE, PlacedCollator, SplitStream, StreamPlace
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.distillation import recipe as training
from fixtures_runs import forget_accelerate, processes
from fixtures_tiny import STUDENT_SIZE, photo, save_clip, student

datasets = pytest.importorskip("datasets")

NUM_SHARDS, ROWS = 4, (5, 3, 6, 4)  # of each shard


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    forget_accelerate()
    yield
    forget_accelerate()


def encoded(seed):
    buffer = io.BytesIO()
    photo(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Parquet files of 18 images in all, whose `id` is their number."""
    folder, first = tmp_path_factory.mktemp("shards"), 0
    for shard, number in enumerate(ROWS):
        ids = range(first, first + number)
        rows = {"image": [{"bytes": encoded(row), "path": None} for row in ids], "id": list(ids)}
        data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        data.to_parquet(folder / f"train-{shard:05d}-of-{NUM_SHARDS:05d}.parquet")
        first += number
    return folder


@functools.cache
def loaded(shards):
    return load_images(shards, streaming=True)


def stream(shards, *, process=0, num_processes=1, num_workers=0, state=None, **options):
    split = SplitStream(loaded(shards).dataset, name="photos", **{"block_size": 4, **options})
    split.share(process, num_processes, num_workers)
    place = StreamPlace(split)
    if state is not None:
        place.go_on(state)
    return place


def ids_of(rows):
    return {"ids": [row["id"] for row in rows]}


def batches(place, number, *, num_workers=0, batch_size=3):
    loader = DataLoader(
        place.stream, batch_size=batch_size, num_workers=num_workers, collate_fn=PlacedCollator(ids_of)
    )
    found = []
    for batch in loader:
        found.append(place.take(batch)["ids"])
        if len(found) == number:
            return found
    raise AssertionError("a stream of training images never ends")


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2), (4, 2)])
def test_all_readers_together_give_every_row_once_an_epoch(shards, num_processes, num_workers):
    epochs = collections.defaultdict(list)
    for process in range(num_processes):
        place = stream(shards, process=process, num_processes=num_processes, num_workers=num_workers)
        loader = DataLoader(place.stream, batch_size=1, num_workers=num_workers, collate_fn=list)
        done = set()  # of two epochs
        for (row,) in loader:
            worker, epoch, _ = row[PLACE]
            epochs[epoch].append(row["id"])
            if epoch == 2:
                done.add(worker)
            if len(done) == max(1, num_workers):
                break
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(sum(ROWS)))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(sum(ROWS)))


def test_a_process_reads_its_own_shards_alone_where_that_is_even(shards, monkeypatch, caplog):
    read, rows = [], split_streams._Rows.__init__

    def noted(self, dataset, shards, *inputs):
        read.append(sorted(shards))
        rows(self, dataset, shards, *inputs)

    monkeypatch.setattr(split_streams._Rows, "__init__", noted)
    for process in range(2):
        batches(stream(shards, process=process, num_processes=2), 1)
    assert sorted(read[0] + read[1]) == [0, 1, 2, 3] and len(read[0]) == 2 and not caplog.records
    batches(stream(shards, process=1, num_processes=3), 1)
    assert read[2] == [0, 1, 2, 3]
    assert "photos: 4 shards cannot be shared out evenly among 3 processes" in caplog.text


def test_the_order_follows_the_seed(shards):
    first, again, other = (batches(stream(shards, seed=seed), 6) for seed in (0, 0, 1))
    assert first == again != other


def test_a_part_of_a_stream_stays_that_part_in_any_number_of_processes(shards):
    """Its first rows are held out: shared out by shards, others would be left out, and some of those trained on."""
    data = load_images(shards, streaming=True)
    rest, seen = data.dataset.skip(7), []
    for process in range(2):
        split = SplitStream(rest, name="photos", whole=False, block_size=4)
        split.share(process, 2, 0)
        for row in split:
            if row[PLACE][1]:
                break
            seen.append(row["id"])
    assert sorted(seen) == list(range(7, sum(ROWS))) and seen != sorted(seen)


def test_fewer_rows_than_readers_is_an_error(shards):
    with pytest.raises(ValueError, match="photos: expected at least one image for each of 19 processes x 1 readers"):
        batches(stream(shards, process=18, num_processes=19), 1)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_it_goes_on_with_the_batches_of_one_that_was_not_interrupted(shards, num_processes, num_workers):
    options = {"num_processes": num_processes, "num_workers": num_workers}
    moments = (1, 7, 13) if not num_workers else (5,)
    whole = [batches(stream(shards, process=p, **options), 16, num_workers=num_workers) for p in range(num_processes)]
    assert len({str(batch) for batch in whole[0]}) > 8
    for done in moments:
        places = [stream(shards, process=p, **options) for p in range(num_processes)]
        for place in places:
            batches(place, done, num_workers=num_workers)
        state = [place.state() for place in places]
        for process in range(num_processes):
            place = stream(shards, process=process, state=state, **options)
            between = batches(place, 2, num_workers=num_workers)  # and once more
            state_then = [place.state()] * num_processes
            last = stream(shards, process=process, state=state_then, **options)
            rest = between + batches(last, 14 - done, num_workers=num_workers)
            assert rest == whole[process][done:], (done, process)


def test_with_another_number_of_readers_a_new_epoch_begins(shards, caplog):
    places = [stream(shards, process=process, num_processes=2) for process in range(2)]
    for place in places:
        batches(place, 5)
    state = [place.state() for place in places]
    assert {place[0] for one in state for place in one["places"].values()} == {1}
    changed = stream(shards, state=state)
    assert "expected the 2 x 1 readers that the run began with, got 1 x 1: it goes on with epoch 2" in caplog.text
    assert changed.state()["new_epoch"] == 2
    rows = [number for batch in batches(changed, 6) for number in batch]
    assert sorted(rows) == list(range(sum(ROWS)))
    again = stream(shards, state=[stream(shards, state=state).state()])  # killed before its first batch
    assert again.stream.new_epoch == 2


# --- distillations --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


class Interrupted(Exception):
    pass


def run(folder, shards, clip, *, until=None, model=None, **settings):
    forget_accelerate()
    chosen = {"max_steps": 8, "batch_size": 3, "checkpoint_steps": 3, "validation_steps": 50, "report_to": "none"}
    chosen |= {"learning_rate": 1e-2, "mixed_precision": "no", "num_pictures": 0, "statistics_images": 6}
    processor = matching_image_processor(clip, STUDENT_SIZE)
    collator, calls = ImageCollator(processor, teacher_image_processor=clip.image_processor), []

    def collate(rows):
        calls.append(1)
        if until is not None and len(calls) > until:
            raise Interrupted
        return collator(rows)

    return distill(
        model or student(),
        SplitStream(loaded(shards).dataset, name="photos", block_size=4),
        config=DistillationConfig(output_dir=str(folder), **(chosen | settings)),
        image_processor=processor,
        teacher=clip,
        collate_fn=collate,
    )


def test_a_distillation_from_shards_goes_on_to_the_same_bits(shards, clip, tmp_path):
    run(tmp_path / "whole", shards, clip)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", shards, clip, until=9)
    torch.manual_seed(5)
    run(tmp_path / "cut", shards, clip, model=student(seed=5), resume=True)
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_two_processes_go_on_to_the_same_bits(shards, clip, tmp_path):
    def cut_off(rank):
        try:
            run(tmp_path / "cut", shards, clip, until=6)
        except Interrupted:
            os._exit(7)

    assert processes(2, lambda rank: run(tmp_path / "whole", shards, clip)) == [0, 0]
    # Both are cut off reading the same batch, after the first checkpoint.
    assert processes(2, cut_off) == [7, 7]
    resumed = processes(2, lambda rank: run(tmp_path / "cut", shards, clip, model=student(seed=5), resume=True))
    assert resumed == [0, 0]
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    run(tmp_path / "one", shards, clip)
    assert load_file(tmp_path / "one/model.safetensors").keys() == load_file(tmp_path / "cut/model.safetensors").keys()


def test_a_run_by_names_shares_out_whole_streams_by_shards_and_parts_by_rows(shards, clip, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "distill", lambda student, rows, **options: seen.append(rows) or 1 / 0)
    for limit in (None, 5):
        chosen = {"teacher": clip.name, "dataset": str(shards), "validation_split": "train", "streaming": True}
        with pytest.raises(ZeroDivisionError):
            training.train(
                training.TrainingConfig(**chosen, max_images=limit),
                DistillationConfig(output_dir=str(tmp_path), max_steps=8, seed=3),
                command="apm distill",
            )
    with pytest.raises(ValueError, match="--max_steps: expected a number with --streaming"):
        training.train(
            training.TrainingConfig(**chosen), DistillationConfig(output_dir=str(tmp_path)), command="apm distill"
        )
    assert [(rows.num_shards, rows.seed) for rows in seen] == [(4, 3), (1, 3)]


# --- tar shards -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """WebDataset's shards: two files of one name are a row."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for row in range(3 * shard, 3 * shard + 3):
                for suffix, content in (("png", encoded(row)), ("cls", str(row % 2).encode())):
                    member = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pattern", ["", "*.tar", "train-000001.tar"], ids=["folder", "pattern", "file"])
def test_tar_shards_are_a_data_set(tars, pattern, streaming):
    data = load_images(f"{tars}/{pattern}" if pattern else tars, streaming=streaming)
    rows = list(data.dataset)
    assert (data.image_column, data.split) == ("png", "train")
    first = 3 if pattern == "train-000001.tar" else 0
    assert [decode_image(row["png"]).tobytes() for row in rows] == [photo(row).tobytes() for row in range(first, 6)]


def test_tar_shards_are_shared_out_and_gone_on_with(tars):
    data, _ = train_and_validation(tars, streaming=True, validation_split="train")
    seen = []
    for process in range(2):
        split = SplitStream(data.dataset, name="tars")
        split.share(process, 2, 0)
        rows = iter(split)
        given = [next(rows) for _ in range(3)]
        seen += [row["__key__"] for row in given]
        again = SplitStream(data.dataset, name="tars")
        again.share(process, 2, 0)
        again.go_on([{"num_workers": 1, "new_epoch": 0, "next": 0, "places": {"0": [0, 1]}}] * 2)
        assert [row["__key__"] for row, _ in zip(again, range(2), strict=False)] == [
            row["__key__"] for row in given[1:]
        ]
    assert sorted(seen) == [f"{row:06d}" for row in range(6)]


def test_a_pattern_that_fits_nothing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none"):
        load_images(tmp_path / "none*.tar", streaming=True)
