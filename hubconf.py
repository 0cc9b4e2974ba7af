"""Entry points of torch.hub; nothing has to be installed but the dependencies.

    pair = torch.hub.load("user/apm_hf", "apm")                        # the small pair in the package
    pair = torch.hub.load("user/apm_hf", "apm", "user/apm-photos", teacher="openai/clip-vit-base-patch16")
    model = torch.hub.load("user/apm_hf", "apm_model", "user/apm-photos")

In a checkout: `torch.hub.load(".", "apm", source="local")`.
"""

import sys
from pathlib import Path

dependencies = ["huggingface_hub", "numpy", "PIL", "psutil", "safetensors", "torch", "tqdm", "transformers"]

_SOURCES = str(Path(__file__).parent / "src")
sys.path.insert(0, _SOURCES)
try:
    import apm_hf
finally:
    sys.path.remove(_SOURCES)


def apm(model=None, *, teacher=None, **options):
    """Load a student with its image processor and its teacher; see `apm_hf.APM.load`.

    Args:
        model: the student's name on the Hub or its folder; without model and teacher, the small pair in the package.
        teacher: the teacher's name or folder.
        **options: device and dtype.
    """
    return apm_hf.APM.load(model, teacher=teacher, **options)


def apm_model(name, **options):
    """Load a student alone, in evaluation mode; see `transformers.AutoModel.from_pretrained`.

    Args:
        name: its name on the Hub or its folder.
        **options: of `from_pretrained`.
    """
    return apm_hf.APMModel.from_pretrained(name, **options).eval()
