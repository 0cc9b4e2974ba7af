"""`examples/train.py` as users start it: plain, through `accelerate launch`, interrupted, published.

Subprocesses import everything anew, so there are few of them; the rest calls the script's `main` in this process.
Several processes at once are in `test_scaling.py`.
"""

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from apm_hf import APMModel, TTTConfig, load_teacher
from apm_hf.commands import distill
from apm_hf.commands.main import main
from apm_hf.data.images import ImageCollator
from apm_hf.distillation import matching_image_processor
from apm_hf.distillation import recipe as training
from apm_hf.ttt.classification import TTTClassifier
from fixtures_tiny import LABELS, photo, save_clip, save_splits, student

datasets = pytest.importorskip("datasets")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "train.py"
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


@pytest.fixture
def script(here):
    return load(SCRIPT)


def load(path):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def flags(place, output_dir, **settings):
    settings = {
        "teacher": place / "clip",
        "dataset": place / "photos",
        "output_dir": output_dir,
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


def train(script, monkeypatch, arguments):
    """`python examples/train.py ...`, without the new process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    forget_accelerate()
    script.main()


def launch(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


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
        assert str(path) not in text, "the card names a path of this machine"


def test_accelerate_launches_it_on_a_stream_in_bfloat16(place, environment, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command.append(str(EXAMPLES / "configs/cpu.yaml"))
    settings = {"streaming": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 2, "checkpoint_steps": 2}
    words = [*command, str(SCRIPT), *flags(place, tmp_path / "run", batch_size=4, **settings)]
    assert "processes: 1" in launch(words, environment)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert (tmp_path / "run/pictures/step_000006.png").exists() and losses(tmp_path / "run")
    assert_loads(tmp_path / "run")
    assert_card_without_paths(tmp_path / "run", tmp_path, place)


def test_the_same_command_gives_the_same_model_and_logs_its_processes(script, monkeypatch, place, tmp_path, caplog):
    train(script, monkeypatch, flags(place, tmp_path / "first"))
    assert "processes: 1" in caplog.text
    train(script, monkeypatch, flags(place, tmp_path / "second"))
    assert largest_difference(tmp_path / "first", tmp_path / "second") == 0
    train(script, monkeypatch, flags(place, tmp_path / "third", seed=1))
    assert largest_difference(tmp_path / "first", tmp_path / "third") > 1e-2


def test_apm_distill_makes_the_same_model_with_the_same_flags(script, monkeypatch, place, tmp_path, capfd):
    train(script, monkeypatch, flags(place, tmp_path / "script", max_steps=2))
    forget_accelerate()
    capfd.readouterr()
    words = [word.replace("_", "-") if word.startswith("--") else word for word in flags(place, tmp_path / "command")]
    assert main(["distill", *words, "--max_steps", "2", "--json", "--quiet"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert set(told) == set(distill.RESULT)
    assert told["output_dir"] == str(tmp_path / "command") and told["steps"] == 2 and told["processes"] == 1
    assert told["metrics"] == json.loads((tmp_path / "command/metrics.json").read_text())
    assert largest_difference(tmp_path / "script", tmp_path / "command") == 0
    assert_card_without_paths(tmp_path / "command", tmp_path, place)
    assert "apm distill --teacher clip" in (tmp_path / "command/README.md").read_text()


def test_a_run_goes_on_where_it_was_interrupted(script, monkeypatch, place, tmp_path):
    settings = {"batch_size": 4, "checkpoint_steps": 3, "max_steps": 7, "num_locations": 5}
    train(script, monkeypatch, flags(place, tmp_path / "whole", **settings))
    seen, collate = [], ImageCollator.__call__

    def interrupted(collator, rows):
        seen.append(rows)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return collate(collator, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageCollator, "__call__", interrupted)
        train(script, monkeypatch, flags(place, tmp_path / "cut", **settings))
    assert not (tmp_path / "cut/model.safetensors").exists()
    train(script, monkeypatch, flags(place, tmp_path / "cut", **settings, resume=True))
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") == 0


def test_the_card_names_no_path_however_the_flags_are_written(script, monkeypatch, place, tmp_path):
    words = flags(place, tmp_path / "run", max_steps=1)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    train(script, monkeypatch, [f"{name}={value}" for name, value in pairs])
    assert_card_without_paths(tmp_path / "run", tmp_path, place)
    text = (tmp_path / "run/README.md").read_text()
    assert "--max_steps" in text and "hidden_sizes" in text, "the command can be given again"


def test_the_students_input_and_architecture_can_be_chosen(script, monkeypatch, place, tmp_path):
    settings = {
        "config_overrides": json.dumps({**STUDENT, "local_patch": True}),
        "image_processor": '{"do_min_max": true}',
    }
    train(script, monkeypatch, flags(place, tmp_path / "run", max_steps=1, **settings))
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.local_patch and model.config.feature_size == 16
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").do_min_max


def test_the_result_is_published_with_its_card_where_that_is_asked_for(script, monkeypatch, place, tmp_path):
    published = []

    def publish(folder, repo_id):
        published.append((Path(folder), repo_id, (Path(folder) / "README.md").read_text()))
        return "https://huggingface.co/someone/apm-tiny/commit/1"

    monkeypatch.setattr(training, "publish", publish)
    settings = {"push_to_hub": True, "hub_model_id": "someone/apm-tiny", "max_steps": 1}
    train(script, monkeypatch, flags(place, tmp_path / "run", **settings))
    ((folder, repo_id, card),) = published
    assert (folder, repo_id) == (tmp_path / "run", "someone/apm-tiny")
    assert 'from_pretrained("someone/apm-tiny", trust_remote_code=True)' in card and "](islands.png)" in card


def test_publishing_without_a_name_is_refused_before_anything_is_loaded(script, monkeypatch, place, tmp_path):
    monkeypatch.setattr(training, "load_teacher", lambda *_, **__: pytest.fail("the teacher is loaded first"))
    with pytest.raises(ValueError, match="--push_to_hub: expected --hub_model_id"):
        train(script, monkeypatch, flags(place, tmp_path / "run", push_to_hub=True))


def test_help_names_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(script, monkeypatch, ["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name in ("teacher", "dataset", "output_dir", "max_steps", "num_locations", "mixed_precision", "push_to_hub"):
        assert f"--{name}" in printed


def near(path):
    """Rows of a result file; a student whose widths are no multiples of 16 is fitted alike up to rounding."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "cosine": pytest.approx(row["cosine"], abs=1e-4)} for row in rows]


def test_adapting_to_a_data_set_compares_the_machine_with_its_teacher(here, place, environment, tmp_path, capsys):
    images = [(label, photo(seed)) for seed, label in enumerate(LABELS * 2)]
    for seed, (label, image) in enumerate(images):
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / label / f"{seed}.png")
    machine = student(initializer_range=0.3, image_size=32)
    machine.save_pretrained(tmp_path / "apm")
    teacher = load_teacher(place / "clip", device="cpu")
    matching_image_processor(teacher, 32).save_pretrained(tmp_path / "apm")
    settings = {"teacher": place / "clip", "dataset": tmp_path / "photos", "model": tmp_path / "apm", "steps": 4}
    words = [word for name, value in {**settings, "batch_size": 4}.items() for word in (f"--{name}", str(value))]
    path = EXAMPLES / "test_time_training.py"
    here.setattr(sys, "argv", [str(path), *words])
    load(path).main()
    printed = dict(re.findall(r"^(\S.*?)\s{2,}(\S+)$", capsys.readouterr().out, re.MULTILINE))
    classifier = TTTClassifier(teacher, LABELS, config=TTTConfig.preset("fast", start="model", steps=4), model=machine)
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
    environment = {name: value for name, value in environment.items() if name != "ACCELERATE_USE_CPU"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    here.setattr(sys, "argv", [str(path), *words, "--output_file", str(alone)])
    load(path).main()
    printed = launch([*launcher, *words, "--output_file", str(shared), "--batch_size", "2"], environment)
    assert re.search(r"^processes\s+2$", printed, re.MULTILINE)
    assert [json.loads(line)["image"] for line in shared.read_text().splitlines()] == list(range(6))
    assert near(alone) == near(shared)


def test_examples_are_short_and_say_how_to_start_them():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 200, path.name
        assert f"examples/{path.name}" in text.split('"""')[1], path.name
