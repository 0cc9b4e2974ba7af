"""Publish, and load in a process with an empty cache and without the package: the same outputs.

One such process, since each imports everything anew; `loads_from_hub.py` is what it runs.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from apm_hf import (
    APMForImageClassification,
    APMForSemanticSegmentation,
    APMForZeroShotImageClassification,
    APMImageProcessorPil,
    load_teacher,
)
from apm_hf.publishing.cards import CardFacts, write_card
from apm_hf.publishing.hub import publish
from fixtures_hub import TOKEN, LoopbackHub, client_of
from fixtures_pipelines import LABELS, label_map, scores
from fixtures_tiny import (
    FEATURE_SIZE,
    STUDENT_SIZE,
    TEACHER_SIZE,
    dense_student,
    photo,
    randomise,
    resampling_slack,
    save_clip,
    student,
    student_config,
    tokenizer,
)

HEADS = {"parts": APMForSemanticSegmentation, "classes": APMForImageClassification}
NAMES = {"num_labels": 3, "id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}


@pytest.fixture(scope="module")
def hub():
    hub = LoopbackHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """Folders by name; all of them are on the Hub."""
    root = tmp_path_factory.mktemp("published")
    folders = {name: root / name for name in ("apm", "dense", "parts", "classes", "texts")}
    models = {"apm": student()}
    models |= {name: randomise(head(student_config(**NAMES))) for name, head in HEADS.items()}
    clip = load_teacher(save_clip(root / "clip"), device="cpu").model
    models["texts"] = APMForZeroShotImageClassification.from_dual_encoder(student(seed=3), clip)
    tokenizer().save_pretrained(folders["texts"])
    models["dense"] = dense_student(teacher_name="someone/vit")
    models["dense"].trigger.tower.save_pretrained(root / "vit")
    facts = {"teacher": "someone/teacher", "dataset": "someone/photos", "command": "make", "steps": 1}
    with client_of(hub, root):
        for name, folder in folders.items():
            models[name].save_pretrained(folder)
            side = 2 * TEACHER_SIZE if name == "dense" else STUDENT_SIZE
            APMImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
            number = models[name].num_parameters()
            write_card(folder, CardFacts(repo_id=str(folder), num_parameters=number, metrics={"cosine": 0.5}, **facts))
            publish(folder, name, token=TOKEN)
        photos = root / "photos"
        photos.mkdir()
        for seed in range(3):
            photo(seed).save(photos / f"{seed}.png")
        api = HfApi(token=TOKEN)
        api.create_repo("vit")
        api.upload_folder(folder_path=root / "vit", repo_id="someone/vit")
        for kind, name in (("dataset", "photos"), ("space", "demo")):
            api.create_repo(name, repo_type=kind, space_sdk="gradio" if kind == "space" else None)
            api.upload_folder(folder_path=photos, repo_id=f"someone/{name}", repo_type=kind)
    return folders


@pytest.fixture(scope="module")
def outputs(hub, published, environment, tmp_path_factory):
    """Return what the process without the package gets, by name."""
    place, home = tmp_path_factory.mktemp("user"), tmp_path_factory.mktemp("home")
    photo(99).save(place / "photo.png")
    process = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("loads_from_hub.py")
    done = subprocess.run(
        [sys.executable, str(script), "outputs.npz"],
        cwd=place,
        env=process | hub.environment(home, token=None),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with np.load(place / "outputs.npz") as arrays:
        return dict(arrays)


def test_a_user_without_the_package_gets_the_same_outputs_to_the_bit(outputs, published):
    model = AutoModel.from_pretrained(published["apm"]).eval()
    # The stranger's backend: where there is torchvision, that one; the next test has both.
    inputs = AutoImageProcessor.from_pretrained(published["apm"])(photo(99), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, coordinates=torch.tensor([[0.0, 0.0], [-0.3, 0.7]]))
    for name in ("last_hidden_state", "rgb", "pooler_output"):
        assert expected[name].std() > 1e-3 and np.array_equal(expected[name].numpy(), outputs[name])


WITH_TORCHVISION = """
import sys
sys.modules["apm_hf"] = None
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor
arrays = {}
for backend in (None, "torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained("someone/apm", trust_remote_code=True, backend=backend)
    assert processor.backend == (backend or "torchvision"), processor
    processor.save_pretrained("again")
    processor = AutoImageProcessor.from_pretrained("again", trust_remote_code=True, backend=backend)
    assert processor.backend == (backend or "torchvision"), processor
    arrays[str(backend)] = processor(Image.open("photo.png"), return_tensors="np")["pixel_values"]
np.savez("arrays.npz", **arrays)
"""


def test_with_torchvision_a_user_without_the_package_gets_either_backend(hub, published, environment, tmp_path):
    photo(99).save(tmp_path / "photo.png")
    stubs = {} if is_torchvision_available() else {"PYTHONPATH": str(Path(__file__).with_name("stubs"))}
    done = subprocess.run(
        [sys.executable, "-c", WITH_TORCHVISION],
        cwd=tmp_path,
        env=environment | hub.environment(tmp_path / "home", token=None) | stubs,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = APMImageProcessorPil.from_pretrained(published["apm"])(photo(99), return_tensors="np")["pixel_values"]
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert np.array_equal(arrays["pil"], expected) and np.array_equal(arrays["torchvision"], arrays["None"])
        slack = resampling_slack(APMImageProcessorPil(), backend="torchvision")
        assert 0 < np.abs(arrays["torchvision"] - expected).max() < slack


def test_the_cards_snippets_run_as_they_stand(outputs):
    assert outputs["snippets"] == 2 and outputs["shown"].shape == (1, 2, 16) and np.isfinite(outputs["shown"]).all()


def test_pipelines_from_the_hub_do_as_from_folders(outputs, published):
    photos = [photo(seed) for seed in range(3)]
    assert np.array_equal(outputs["photos"], np.stack(photos))
    local = {name: str(folder) for name, folder in published.items()}
    features = np.array(pipeline("image-feature-extraction", model=local["apm"], device="cpu")(photos))
    np.testing.assert_allclose(outputs["features"], features, atol=1e-6)
    assert features.std(axis=0).max() > 1e-3
    classify = pipeline("image-classification", model=local["classes"], device="cpu")
    np.testing.assert_allclose(outputs["classes"], scores(classify(photos)), atol=1e-6)
    zero_shot = pipeline("zero-shot-image-classification", model=local["texts"], device="cpu")
    np.testing.assert_allclose(outputs["texts"], scores(zero_shot(photos, candidate_labels=LABELS)), atol=1e-6)
    for name in ("classes", "texts"):
        assert outputs[name].std(axis=0).max() > 1e-3
    rows = pipeline("image-segmentation", model=local["parts"], device="cpu")(photos, subtask="semantic")
    parts = np.stack([label_map(row) for row in rows])
    assert np.array_equal(outputs["parts"], parts) and len(np.unique(parts)) > 1


def test_a_dense_student_whose_teacher_lies_elsewhere_on_the_hub_answers_from_pixels_to_the_bit(outputs, published):
    assert not any("tower" in name for name in load_file(published["dense"] / "model.safetensors"))
    model = dense_student()
    inputs = AutoImageProcessor.from_pretrained(published["dense"])(
        [photo(seed) for seed in range(3)], return_tensors="pt"
    )
    model.output_size = (5, 7)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert outputs["dense"].shape == (3, 1, 35, FEATURE_SIZE) and expected.std(dim=0).min() > 1e-3
    np.testing.assert_allclose(outputs["dense"][:, 0], expected, atol=1e-6)


def test_a_download_brings_everything(hub, published, tmp_path):
    with client_of(hub, tmp_path / "home"):
        snapshot_download("someone/apm", local_dir=tmp_path / "here")  # as `hf download` does
    here = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir() if path.is_file()}
    assert here == {name: file.content for name, file in hub.model("someone/apm").files().items()}
    assert {"config.json", "model.safetensors", "modeling_apm.py", "README.md"} <= here.keys()


def test_a_private_or_gated_model_opens_to_its_token_only(hub, published, tmp_path):
    repository = hub.model("someone/apm")
    for lock in ("private", "gated"):
        setattr(repository, lock, True)
        try:
            with client_of(hub, tmp_path / lock):
                with pytest.raises(OSError, match="private|gated|restricted|not a valid model identifier"):
                    AutoModel.from_pretrained("someone/apm")
                assert AutoModel.from_pretrained("someone/apm", token=TOKEN).config.model_type == "apm"
        finally:
            setattr(repository, lock, False)


def test_a_revision_is_loaded_as_it_was(hub, published, tmp_path):
    with client_of(hub, tmp_path):
        other = student(seed=7)
        other.save_pretrained(tmp_path / "other")
        APMImageProcessorPil().save_pretrained(tmp_path / "other")
        publish(tmp_path / "other", "someone/apm", token=TOKEN, revision="other")
        branch = AutoModel.from_pretrained("someone/apm", revision="other")
        main = AutoModel.from_pretrained("someone/apm")
    assert torch.equal(branch.decoder.feature_head.weight, other.decoder.feature_head.weight)
    assert not torch.equal(main.decoder.feature_head.weight, other.decoder.feature_head.weight)


def test_a_model_can_be_pushed_as_any_other(hub, tmp_path):
    with client_of(hub, tmp_path):
        student().push_to_hub("someone/pushed", token=TOKEN)
        APMImageProcessorPil().push_to_hub("someone/pushed", token=TOKEN)
    files = hub.model("someone/pushed").files()
    assert {"config.json", "model.safetensors", "modeling_apm.py", "preprocessor_config.json"} <= set(files)
    assert b'"auto_map"' in files["config.json"].content and b'"auto_map"' in files["preprocessor_config.json"].content


def test_data_sets_and_spaces_travel_too(hub, published):
    assert len(hub.repositories["dataset", "someone/photos"].files()) == 3
    space = hub.repositories["space", "someone/demo"]
    assert space.sdk == "gradio" and space.files()["0.png"].lfs
