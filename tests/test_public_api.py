"""Importing `apm_hf`: the public names, what transformers knows afterwards, and what is not loaded."""

import subprocess
import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# At its top level transformers 5.17 refuses this class without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import apm_hf
from fixtures_tiny import student, student_config


def test_public_names_are_sorted_unique_and_importable():
    names = apm_hf.__all__
    assert names == sorted(set(names))
    found = {}
    exec("from apm_hf import *", found)
    assert set(found) - {"__builtins__"} == set(names)


def test_auto_classes_know_apm(tmp_path):
    assert type(AutoConfig.for_model("apm")) is apm_hf.APMConfig
    assert type(AutoModel.from_config(student_config())) is apm_hf.APMModel
    assert type(AutoModelForImageClassification.from_config(student_config())) is apm_hf.APMForImageClassification
    assert type(AutoModelForSemanticSegmentation.from_config(student_config())) is apm_hf.APMForSemanticSegmentation
    student().save_pretrained(tmp_path)
    apm_hf.APMImageProcessor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is apm_hf.APMConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is apm_hf.APMModel
    processors = (apm_hf.APMImageProcessor, apm_hf.APMImageProcessorPil)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), processors)


def test_the_pipeline_is_known_by_its_name():
    _, task, _ = PIPELINE_REGISTRY.check_task("apm-zero-shot-image-classification")
    assert task["impl"] is apm_hf.TestTimeTrainingPipeline


def last_line(program: str, environment: dict[str, str]) -> str:
    """Return what a fresh process that runs the program prints last."""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_fresh_import_loads_none_of_the_extras_and_tells_the_auto_classes(environment):
    """In one process: first what is loaded, then whether the Auto classes, imported later, know the package's."""
    extras = ["accelerate", "datasets", "evaluate", "gradio", "matplotlib", "sklearn", "tensorboard"]
    program = f"""
import sys
from transformers import PreTrainedModel, pipelines  # load accelerate and scikit-learn themselves, where there are any
before = set(sys.modules)
import apm_hf, apm_hf.commands.main, apm_hf.ttt, apm_hf.teachers
loaded = sorted(set({extras!r}) & (set(sys.modules) - before)), "datasets" in sys.modules

from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from apm_hf.assets import DEMO_MODEL
assert type(AutoConfig.from_pretrained(DEMO_MODEL)) is apm_hf.APMConfig
assert type(AutoImageProcessor.from_pretrained(DEMO_MODEL)).__module__.startswith("apm_hf.")
assert type(AutoModel.from_pretrained(DEMO_MODEL)) is apm_hf.APMModel
print(*loaded)
"""
    assert last_line(program, environment) == "[] False"
