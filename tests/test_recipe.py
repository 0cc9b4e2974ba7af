"""`apm distill` as users call it: plain, on a stream, interrupted, published. Processes are in `test_scaling.py`."""

import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from apm_hf import APMModel
from apm_hf.commands import distill
from apm_hf.commands.main import main
from apm_hf.data.images import ImageCollator
from apm_hf.distillation import recipe as training
from apm_hf.distillation import validation
from fixtures_tiny import photo, save_clip, save_splits

datasets = pytest.importorskip("datasets")

STUDENT = {"image_size": 24, "patch_size": 8, "position_size": 16, "hidden_sizes": [32, 24], "rgb_hidden_sizes": [12]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, and 16 photos to train on beside 5 to validate on: an odd number for two processes."""
    folder = tmp_path_factory.mktemp("place")
    save_clip(folder / "clip")
    save_splits(folder / "photos", num_train=16, num_validation=5)
    return folder


@pytest.fixture
def here(monkeypatch, tmp_path_factory):
    """Run commands in this process; what they set up is undone."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    level = logging.getLogger("apm_hf").level
    forget_accelerate()
    yield monkeypatch
    forget_accelerate()
    logging.getLogger("apm_hf").setLevel(level)


@pytest.fixture
def no_picture(monkeypatch):
    """Leave out the card's picture, which takes longer than all the rest of so short a run."""
    monkeypatch.setattr(training, "_draw_card_picture", lambda *inputs: False)


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def flags(place, output_dir, **settings):
    settings = {
        "teacher": place / "clip",
        "dataset": place / "photos",
        "output_dir": output_dir,
        "preset": "tiny",
        "config_overrides": json.dumps(STUDENT),
        "max_steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        **settings,
    }
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def distilled(arguments, *more):
    """`apm distill ...`, without the new process; its exit status."""
    forget_accelerate()
    return main(["distill", *arguments, *more])


def losses(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (folder / "logs").glob("*/events.out.tfevents.*")
    return [event.value for event in EventAccumulator(str(file)).Reload().Scalars("loss")]


def largest_difference(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def assert_loads(folder):
    model = AutoModel.from_pretrained(folder).eval()
    assert type(model) is APMModel
    with torch.no_grad():
        answer = model(**AutoImageProcessor.from_pretrained(folder)(photo(99), return_tensors="pt"))
    assert answer.last_hidden_state.shape == (1, 9, 16) and answer.last_hidden_state.isfinite().all()


def assert_card_without_paths(folder, *places):
    text = (folder / "README.md").read_text()
    assert "# " in text and "feature_cosine" in text and "| teacher | clip |" in text and "| data | photos |" in text
    for path in places:
        assert str(path) not in text, "the card names a path of this computer"


def test_a_stream_in_bfloat16_with_passes_and_checkpoints(here, no_picture, place, tmp_path):
    settings = {"streaming": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 2, "checkpoint_steps": 2}
    assert distilled(flags(place, tmp_path / "run", batch_size=4, **settings)) == 0
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert (tmp_path / "run/pictures/step_000006.png").exists() and losses(tmp_path / "run")
    assert_loads(tmp_path / "run")
    assert_card_without_paths(tmp_path / "run", tmp_path, place)


def test_the_same_command_gives_the_same_model_however_its_flags_are_written(
    here, no_picture, place, tmp_path, caplog, capfd
):
    assert distilled(flags(place, tmp_path / "first", max_steps=2), "--json", "--quiet") == 0
    told = json.loads(capfd.readouterr().out)
    assert set(told) == set(distill.RESULT)
    assert told["output_dir"] == str(tmp_path / "first") and told["steps"] == 2 and told["processes"] == 1
    assert told["verdict"].startswith("this student is ") and "no better than a constant" in told["warning"]
    assert told["metrics"] == json.loads((tmp_path / "first/metrics.json").read_text())
    words = [word.replace("_", "-") if word.startswith("--") else word for word in flags(place, tmp_path / "second")]
    pairs = [f"{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]
    assert distilled(pairs, "--max-steps", "2") == 0 and "processes: 1" in caplog.text
    summary = capfd.readouterr().out.splitlines()
    assert summary[0].startswith(f"{tmp_path / 'second'}: a student of ")
    figures = told["metrics"][-1]
    for line, name in zip(summary[2:6], ("feature", "mean", "position", "ridge"), strict=True):
        assert float(line.split()[-1]) == pytest.approx(figures[f"{name}_r2"], abs=1e-3)
    assert summary[7].startswith("Do not use it: ") and summary[-1].startswith("next: apm islands ")
    assert largest_difference(tmp_path / "first", tmp_path / "second") == 0
    for name in ("first", "second"):
        assert_card_without_paths(tmp_path / name, tmp_path, place)
        card = (tmp_path / name / "README.md").read_text()
        assert "apm distill --teacher" in card and "hidden_sizes" in card, "the command can be given again"
        for title, figure in (("this student", "feature_r2"), ("ridge regression", "ridge_r2")):
            assert f"| {title} | {figures[figure]:.4f} |" in card
    assert distilled(flags(place, tmp_path / "third", max_steps=2, seed=1)) == 0
    assert largest_difference(tmp_path / "first", tmp_path / "third") > 1e-2


def test_a_run_goes_on_where_it_was_interrupted(here, no_picture, place, tmp_path):
    settings = {"batch_size": 4, "checkpoint_steps": 3, "max_steps": 7, "num_locations": 5}
    assert distilled(flags(place, tmp_path / "whole", **settings)) == 0
    seen, collate = [], ImageCollator.__call__

    def interrupted(collator, rows):
        seen.append(rows)
        if len(seen) == 13:  # six batches for controls, two to validate, five steps
            raise KeyboardInterrupt
        return collate(collator, rows)

    with here.context() as patch:
        patch.setattr(ImageCollator, "__call__", interrupted)
        assert distilled(flags(place, tmp_path / "cut", **settings)) == 130
    assert not (tmp_path / "cut/model.safetensors").exists()
    assert distilled(flags(place, tmp_path / "cut", **settings, resume=True)) == 0
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") == 0


def test_input_and_architecture_can_be_chosen_and_the_result_is_published_with_its_card(here, place, tmp_path, caplog):
    published = []

    def publish(folder, repo_id):
        published.append((Path(folder), repo_id, (Path(folder) / "README.md").read_text()))
        return "https://huggingface.co/someone/apm-tiny/commit/1"

    here.setattr(training, "publish", publish)
    settings = {
        "config_overrides": json.dumps({**STUDENT, "local_patch": True}),
        "image_processor": '{"do_min_max": true}',
        "push_to_hub": True,
        "hub_model_id": "someone/apm-tiny",
    }
    assert distilled(flags(place, tmp_path / "none", max_steps=1, **settings)) == 1
    assert not published and "not published, since the card warns of this model; `apm push" in caplog.text
    assert "**Do not use this model: this student is no better" in (tmp_path / "none/README.md").read_text()
    here.setattr(validation, "worse_than_constant", lambda metrics: None)
    assert distilled(flags(place, tmp_path / "run", max_steps=1, **settings)) == 0
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.local_patch and model.config.feature_size == 16
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").do_min_max
    ((folder, repo_id, card),) = published
    assert (folder, repo_id) == (tmp_path / "run", "someone/apm-tiny")
    assert 'from_pretrained("someone/apm-tiny", trust_remote_code=True)' in card and "](islands.png)" in card


def test_publishing_without_a_name_is_refused_before_anything_is_loaded(here, place, tmp_path, caplog):
    here.setattr(training, "load_teacher", lambda *_, **__: pytest.fail("the teacher is loaded first"))
    assert distilled(flags(place, tmp_path / "run", push_to_hub=True)) == 1
    assert "--push_to_hub: expected --hub_model_id" in caplog.text


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name in ("teacher", "dataset", "output_dir", "max_steps", "num_locations", "mixed_precision", "push_to_hub"):
        assert f"--{name}" in printed
