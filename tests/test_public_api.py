"""What `import apm_hf` gives, registers and leaves alone."""

import subprocess
import sys

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# At its top level transformers 5.17 refuses this class without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import apm_hf
from fixtures_tiny import student, student_config


def test_public_names_are_sorted_unique_and_importable():
    names = apm_hf.__all__
    assert names == sorted(set(names))
    assert set(names) <= set(dir(apm_hf))
    for name in names:
        assert getattr(apm_hf, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'apm_hf' has no attribute 'adpat'"):
        apm_hf.adpat  # noqa: B018


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


def test_importing_the_package_and_its_command_loads_none_of_the_extras():
    extras = ["accelerate", "datasets", "evaluate", "gradio", "matplotlib", "sklearn", "tensorboard"]
    program = f"""
import sys
from transformers import PreTrainedModel, pipelines  # load accelerate and scikit-learn themselves, where there are any
before = set(sys.modules)
import apm_hf, apm_hf.cli, apm_hf.ttt, apm_hf.teachers
print(sorted(set({extras!r}) & (set(sys.modules) - before)))
print("datasets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert (done.stdout.split("\n"), done.returncode) == (["[]", "False", ""], 0), done.stderr
