"""Examples as users start them, but for the new process: it would import everything anew.

`examples/train_segmentation.py` is in `test_probes.py`, the files for `accelerate launch` are in `test_scaling.py`.
"""

import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from apm_hf import APMModel, TTTConfig, load_teacher
from apm_hf.data.images import ImageCollator
from apm_hf.distillation import matching_image_processor
from apm_hf.ttt.classification import TTTClassifier
from fixtures_runs import forget_accelerate, processes
from fixtures_tiny import LABELS, photo, save_clip, save_splits, student

datasets = pytest.importorskip("datasets")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, and 16 photos to train on beside 5 to validate on: an odd number for two processes."""
    folder = tmp_path_factory.mktemp("place")
    save_clip(folder / "clip")
    save_splits(folder / "photos", num_train=16, num_validation=5)
    return folder


@pytest.fixture
def here(monkeypatch, tmp_path_factory):
    """Run an example's `main` in this process; what it sets up is undone."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    level = logging.getLogger("apm_hf").level
    forget_accelerate()
    yield monkeypatch
    forget_accelerate()
    logging.getLogger("apm_hf").setLevel(level)


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(**settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.fixture
def train(here, place):
    """`python examples/train.py --output_dir FOLDER ...`, without the new process; the module it is."""
    script = load("train")

    def run(folder, **settings):
        named = {"teacher": place / "clip", "dataset": place / "photos", "output_dir": folder}
        numbers = {"max_steps": 7, "batch_size": 8, "learning_rate": 1e-2, **settings}
        here.setattr(sys, "argv", ["train.py", *flags(**named, **numbers)])
        forget_accelerate()
        script.main()

    run.script = script
    return run


def largest_difference(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def cosines(printed):
    """Step -> agreement with the teacher, as `train.py` prints them."""
    return {
        int(step): float(value)
        for step, value in re.findall(r"^step (\d+): .*? (-?[\d.]+) on 5 images$", printed, re.M)
    }


def test_the_loop_learns_and_leaves_an_ordinary_model_with_its_card(train, place, tmp_path, capsys):
    published = []
    train.script.publish = lambda folder, name: (
        published.append((folder, name)) or "https://huggingface.co/someone/apm"
    )
    train(tmp_path / "run", max_steps=20, hub_model_id="someone/apm")
    printed = capsys.readouterr().out
    before, after = cosines(printed)[0], cosines(printed)[20]
    assert after > before + 0.2
    assert published == [(str(tmp_path / "run"), "someone/apm")] and "https://huggingface.co/someone/apm" in printed
    model = AutoModel.from_pretrained(tmp_path / "run").eval()
    assert type(model) is APMModel and model.config.distilled_from
    with torch.no_grad():
        outputs = model(**AutoImageProcessor.from_pretrained(tmp_path / "run")(photo(99), return_tensors="pt"))
    assert outputs.last_hidden_state.shape[-1] == 16 and outputs.last_hidden_state.isfinite().all()
    card = (tmp_path / "run/README.md").read_text()
    assert 'from_pretrained("someone/apm"' in card and "examples/train.py --teacher clip" in card
    assert str(place) not in card and str(tmp_path) not in card


def test_an_interrupted_loop_goes_on_to_the_same_weights(train, here, tmp_path):
    """16 images are two steps an epoch: the checkpoint of step 3 lies within one."""
    train(tmp_path / "whole", checkpoint_steps=3)
    collate, seen = ImageCollator.__call__, []

    def interrupted(collator, rows):
        seen.append(rows)
        if len(seen) == 6:  # one batch was of the validation before the first step
            raise KeyboardInterrupt
        return collate(collator, rows)

    with here.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageCollator, "__call__", interrupted)
        train(tmp_path / "cut", checkpoint_steps=3)
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step_00000003"]
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        train(tmp_path / "cut", checkpoint_steps=3)
    train(tmp_path / "cut", checkpoint_steps=3, resume=True)
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") == 0
    with pytest.raises(SystemExit, match="lower --batch_size"):
        train(tmp_path / "none", batch_size=17)


def test_two_processes_learn_what_one_does(train, here, tmp_path):
    here.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    train(tmp_path / "one")
    assert processes(2, lambda rank: train(tmp_path / "two", batch_size=4)) == [0, 0]
    # Adam makes steps of 1e-2 of gradients of any size, and sums of another order have other last bits.
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-3


def near(path):
    """Rows of a result file; a student whose widths are no multiples of 16 is fitted alike up to rounding."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "cosine": pytest.approx(row["cosine"], abs=1e-4)} for row in rows]


def test_adapting_to_a_data_set_compares_the_model_with_its_teacher(here, place, tmp_path, capsys):
    images = [(label, photo(seed)) for seed, label in enumerate(LABELS * 2)]
    for seed, (label, image) in enumerate(images):
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / label / f"{seed}.png")
    model = student(initializer_range=0.3, image_size=32)
    model.save_pretrained(tmp_path / "apm")
    teacher = load_teacher(place / "clip", device="cpu")
    matching_image_processor(teacher, 32).save_pretrained(tmp_path / "apm")
    words = flags(teacher=place / "clip", dataset=tmp_path / "photos", model=tmp_path / "apm", steps=4, batch_size=4)
    script, alone, shared = load("test_time_training"), tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    here.setattr(sys, "argv", ["test_time_training.py", *words, "--output_file", str(alone)])
    script.main()
    printed = dict(re.findall(r"^(\S.*?)\s{2,}(\S+)$", capsys.readouterr().out, re.MULTILINE))
    classifier = TTTClassifier(teacher, LABELS, config=TTTConfig.preset("fast", start="model", steps=4), model=model)
    result = classifier([image for _, image in images])
    labels = torch.tensor([LABELS.index(label) for label, _ in images])
    expected = {
        "agreement with the teacher": result.agreement,
        "teacher top-1": result.teacher_logits.argmax(dim=1) == labels,
        "adapted APM top-1": result.logits.argmax(dim=1) == labels,
        "cosine to the teacher": result.target_cosine,
    }
    assert (printed["images"], printed["steps"]) == ("6", "4.0000")
    for name, values in expected.items():
        assert float(printed[name]) == pytest.approx(values.float().mean().item(), abs=2e-4), name

    # Two processes, without a word about CPUs, share the images out and write what one does.
    here.delenv("ACCELERATE_USE_CPU")
    here.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    here.setattr(sys, "argv", ["test_time_training.py", *words, "--output_file", str(shared), "--batch_size", "2"])

    def work(rank):
        forget_accelerate()
        script.main()
        (tmp_path / str(rank)).write_text(str(script.process_state().num_processes))

    assert processes(2, work) == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["2", "2"]
    assert [json.loads(line)["image"] for line in shared.read_text().splitlines()] == list(range(6))
    assert near(alone) == near(shared)


def test_examples_are_short_and_say_how_to_start_them():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 200, path.name
        assert f"examples/{path.name}" in text.split('"""')[1], path.name
