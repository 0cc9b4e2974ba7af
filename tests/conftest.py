"""Fixtures and settings for all test modules."""

import gc
import os
from functools import partial
from pathlib import Path

import pytest

# Torch and transformers are imported where they are used: the process that only hands tests out needs neither.

# Before any library reads it. The tests' tensors are tiny: more threads than one only fight over the cores with other
# test processes; scikit-learn's logistic regression then takes several times as long.
os.environ["OMP_NUM_THREADS"] = "1"


# Files that keep a core busy for long begin first, so that no core is idle at the end.
LONG = (
    "demo", "app", "docs", "notebooks", "app_actions", "scaling", "dense", "export", "cli", "hub_roundtrip", "resume",
    "ecosystem_compiled", "evaluation_ablations", "evaluation_suites", "distillation", "dense_evaluation",
    "evaluation_runner",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Accelerate collects garbage after every run: a third of a second for all that was imported, which stays anyway.
    gc.freeze()
    order = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real teachers and photos beside a checkout; where there is none, tests that ask for it skip."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not (path / "teachers").is_dir():
        pytest.skip("no folder with real teachers and photos beside the checkout")
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Models that a test or a fixture of any scope draws without a seed are the same in every run."""
    from transformers import set_seed

    set_seed(0)


@pytest.fixture(autouse=True)
def no_public_teacher(request, monkeypatch):
    """Where no teacher is named, tests take the embedded one, whatever is in this computer's cache or on the Hub."""
    if "hub" not in request.fixturenames:
        monkeypatch.setattr("apm_hf.teachers.defaults.find_on_hub", lambda name: None)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Variables of a process that has a CPU, no network and no settings of its user."""
    home = tmp_path_factory.mktemp("home")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))},
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture
def hub(tmp_path_factory):
    """A Hub of our own, empty, which this process takes for the real one; nobody is logged in."""
    from fixtures_hub import LoopbackHub, client_of

    hub = LoopbackHub()
    with client_of(hub, tmp_path_factory.mktemp("hub_home")):
        yield hub
    hub.close()


@pytest.fixture(scope="module")
def few_pixels():
    """Let `evaluate_islands` fit its probes to few pixels: all 4096 take half the time that small images take."""
    from apm_hf.evaluation.masks import runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner, "ScoringConfig", partial(runner.ScoringConfig, num_train_pixels=256, num_query_pixels=128)
        )
        yield
