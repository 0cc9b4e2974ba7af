"""What a stranger's process does with what was published. Run by test_hub_roundtrip.py, in a folder with `photo.png`.

    python loads_from_hub.py ANSWERS.npz

Nothing of this project is imported: the package is out of reach, and all code comes with the models.
"""

import re
import sys

sys.modules["apm_hf"] = None  # any import of it fails, installed or not

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from huggingface_hub import hf_hub_download  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, pipeline  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

from fixtures_pipelines import LABELS, label_map, scores  # noqa: E402

# At its top level transformers refuses this class without torchvision in some versions.
sys.modules["transformers"].AutoImageProcessor = AutoImageProcessor

MODEL, PARTS, CLASSES, TEXTS, PHOTOS = (f"someone/{name}" for name in ("apm", "parts", "classes", "texts", "photos"))
FIELDS = ("last_hidden_state", "rgb", "pooler_output")
TRUST = {"trust_remote_code": True}


def ask(name):
    model = AutoModel.from_pretrained(name, **TRUST)
    image_processor = AutoImageProcessor.from_pretrained(name, **TRUST)
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(image_processor).__module__.startswith("transformers_modules.")
    inputs = image_processor(Image.open("photo.png"), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, coordinates=torch.tensor([[0.0, 0.0], [-0.3, 0.7]]))
    return model, image_processor, {field: outputs[field].numpy() for field in FIELDS}


def main(answers_file):
    try:
        AutoModel.from_pretrained(MODEL)
        raise SystemExit("code from the Hub was run by somebody who had not said so")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    model, image_processor, answers = ask(MODEL)

    # Saved again by a process that has never seen the package, and loaded from there.
    model.save_pretrained("again")
    image_processor.save_pretrained("again")
    assert all(np.array_equal(value, answers[name]) for name, value in ask("again")[2].items())

    photos = [row["image"] for row in load_dataset(PHOTOS, split="train")]
    answers["photos"] = np.stack([np.asarray(photo) for photo in photos])
    features = pipeline("image-feature-extraction", model=MODEL, **TRUST)(photos, batch_size=2)
    answers["features"] = np.array(features)
    answers["classes"] = scores(pipeline("image-classification", model=CLASSES, **TRUST)(photos, batch_size=2))
    parts = pipeline("image-segmentation", model=PARTS, **TRUST)(photos, subtask="semantic")
    answers["parts"] = np.stack([label_map(row) for row in parts])
    zero_shot = pipeline("zero-shot-image-classification", model=TEXTS, **TRUST)
    answers["texts"] = scores(zero_shot(photos, candidate_labels=LABELS))

    # The card's own snippets, as they stand.
    Image.open("photo.png").save("photo.jpg")
    with open(hf_hub_download(MODEL, "README.md"), encoding="utf-8") as file:
        snippets = re.findall(r"```python\n(.*?)```", file.read(), re.S)
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    answers["snippets"], answers["shown"] = np.array(len(snippets)), namespace["two"].last_hidden_state.numpy()
    np.savez(answers_file, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
