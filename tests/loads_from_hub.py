"""Load what was published as a user without the package does. Run by test_hub_roundtrip.py, beside a `photo.png`.

    python loads_from_hub.py OUTPUTS.npz

Nothing of this project is imported: the package is out of reach, and all code comes with the models.
"""

import json
import re
import sys
from pathlib import Path

sys.modules["apm_hf"] = None  # any import of it fails, installed or not

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from huggingface_hub import hf_hub_download  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

from fixtures_pipelines import LABELS, label_map, scores  # noqa: E402

# At its top level transformers refuses this class without torchvision in some versions.
sys.modules["transformers"].AutoImageProcessor = AutoImageProcessor

NAMES = ("apm", "dense", "parts", "classes", "texts", "photos")
MODEL, DENSE, PARTS, CLASSES, TEXTS, PHOTOS = (f"someone/{name}" for name in NAMES)
AUTO_CLASSES = {
    MODEL: AutoModel,
    DENSE: AutoModel,  # its teacher lies elsewhere on the Hub
    PARTS: AutoModelForSemanticSegmentation,
    CLASSES: AutoModelForImageClassification,
    TEXTS: AutoModelForZeroShotImageClassification,
}
FIELDS = ("last_hidden_state", "rgb", "pooler_output")
TRUST = {"trust_remote_code": True}


def load(name, auto_class):
    """Return a model and its image processor, from a repository or a folder."""
    loaded = auto_class.from_pretrained(name, **TRUST), AutoImageProcessor.from_pretrained(name, **TRUST)
    for one in (*loaded, AutoConfig.from_pretrained(name, **TRUST)):
        assert type(one).__module__.startswith("transformers_modules."), one
    return loaded


def query(name):
    """Return the outputs of the bare model for the photo, by field."""
    model, image_processor = load(name, AutoModel)
    inputs = image_processor(Image.open("photo.png"), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, coordinates=torch.tensor([[0.0, 0.0], [-0.3, 0.7]]))
    return {field: outputs[field].numpy() for field in FIELDS}


def save_again(name, auto_class):
    """Save a model by this process, which has never seen the package, and load it from there: the same weights."""
    folder = f"again/{name}"
    for one in load(name, auto_class):
        one.save_pretrained(folder)
    first, again = (auto_class.from_pretrained(place, **TRUST).state_dict() for place in (name, folder))
    assert first.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in first.items()), name
    for file in ("config.json", "preprocessor_config.json"):  # the code beside them, not the repository's
        assert "--" not in str(json.loads(Path(folder, file).read_text())["auto_map"]), file
    load(folder, auto_class)
    load(folder, AutoModel)


def main(outputs_file):
    try:
        AutoModel.from_pretrained(MODEL)
        raise SystemExit("code from the Hub ran without trust_remote_code")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    outputs = query(MODEL)
    for name, auto_class in AUTO_CLASSES.items():
        save_again(name, auto_class)
    assert all(np.array_equal(value, outputs[name]) for name, value in query(f"again/{MODEL}").items())

    photos = [row["image"] for row in load_dataset(PHOTOS, split="train")]
    outputs["photos"] = np.stack([np.asarray(photo) for photo in photos])
    features = pipeline("image-feature-extraction", model=MODEL, **TRUST)(photos, batch_size=2)
    outputs["features"] = np.array(features)
    dense = pipeline("image-feature-extraction", model=DENSE, model_kwargs={"output_size": (5, 7)}, **TRUST)
    outputs["dense"] = np.array(dense(photos))
    outputs["classes"] = scores(pipeline("image-classification", model=CLASSES, **TRUST)(photos, batch_size=2))
    parts = pipeline("image-segmentation", model=PARTS, **TRUST)(photos, subtask="semantic")
    outputs["parts"] = np.stack([label_map(row) for row in parts])
    zero_shot = pipeline("zero-shot-image-classification", model=TEXTS, **TRUST)
    outputs["texts"] = scores(zero_shot(photos, candidate_labels=LABELS))

    # The card's own snippets, as they stand.
    Image.open("photo.png").save("photo.jpg")
    with open(hf_hub_download(MODEL, "README.md"), encoding="utf-8") as file:
        snippets = re.findall(r"```python\n(.*?)```", file.read(), re.S)
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    outputs["snippets"], outputs["shown"] = np.array(len(snippets)), namespace["two"].last_hidden_state.numpy()
    np.savez(outputs_file, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
