"""What is published, what is refused, and the card: the real client against a Hub on 127.0.0.1."""

import ast
import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPTextConfig

import apm_hf
from apm_hf import APM
from apm_hf.commands.main import main
from apm_hf.data import sample_photos
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.modeling_apm import AUTO_CLASSES
from apm_hf.publishing.cards import CardFacts, card_photos, change_card, write_card, write_card_picture
from apm_hf.publishing.hub import publish
from fixtures_hub import TOKEN, Repository
from fixtures_tiny import TOWER, photo, student, student_config

NAME = "someone/apm-tiny"
FACTS = CardFacts(
    repo_id=NAME,
    teacher="openai/clip-vit-base-patch16",
    dataset="detection-datasets/coco:full",
    command="apm distill --max_steps 5",
    steps=5,
    num_parameters=123456,
    metrics={"feature_cosine": 0.87654, "feature_r2": -0.5},
    versions={"torch": "2.13.0", "commit": "abc1234"},
)
TRAVELLING = {
    "configuration_apm.py",
    "image_processing_apm.py",
    "image_processing_pil_apm.py",
    "modeling_apm.py",
    "position_encoding.py",
}
PATHS = [Path(apm_hf.__file__).with_name(name) for name in sorted(TRAVELLING)]


@pytest.fixture
def trained(tmp_path):
    """A folder as a training run leaves it."""
    folder = tmp_path / "run"
    student().save_pretrained(folder)
    APMImageProcessorPil().save_pretrained(folder)
    write_card(folder, FACTS)
    for name in (
        "metrics.json",
        "pictures/step_000000.png",
        "checkpoints/step_00000002/model.safetensors",
        "checkpoints/step_00000004.partial/random_states_0.pkl",
        "logs/distillation/events.out.tfevents.0",
        "logs/distillation/1.5/hparams.yml",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not empty")
    return folder


def test_a_model_is_published_in_one_commit_with_its_code_and_without_checkpoints_and_pictures_of_data(hub, trained):
    address = publish(trained, NAME, token=TOKEN)
    repository = hub.model(NAME)
    assert list(hub.repositories) == [("model", NAME)] and not repository.private
    assert list(repository.titles.values()) == ["initial commit", "Upload APM"]
    files = repository.files()
    wanted = {"README.md", "card.json", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"}
    assert set(files) == wanted | TRAVELLING
    assert all(files[name].content == (trained / name).read_bytes() for name in files)
    assert files["model.safetensors"].lfs and not files["config.json"].lfs
    assert address == f"{hub.url}/{NAME}/commit/{repository.refs['main']}"


def test_publishing_again_is_one_more_commit_to_the_same_repository(hub, trained):
    publish(trained, NAME, token=TOKEN)
    (trained / "metrics.json").write_text("[]")
    publish(trained, NAME, token=TOKEN, commit_message="Better figures")
    assert list(hub.model(NAME).titles.values()) == ["initial commit", "Upload APM", "Better figures"]
    assert hub.model(NAME).files()["metrics.json"].content == b"[]"


def test_a_name_without_user_is_the_users_own_and_may_be_private(hub, trained):
    assert "/someone/apm-mine/commit/" in publish(trained, "apm-mine", token=TOKEN, private=True)
    assert hub.model("someone/apm-mine").private


def test_a_branch_is_made_where_it_does_not_exist_and_main_stays_as_it_is(hub, trained):
    for _ in range(2):
        publish(trained, NAME, token=TOKEN, revision="experiment")
    repository = hub.model(NAME)
    assert repository.files("main") == {} and "model.safetensors" in repository.files("experiment")


def test_a_pull_request_leaves_the_repository_as_it_is_and_needs_one(hub, trained):
    with pytest.raises(FileNotFoundError, match="other/apm: no such repository"):
        publish(trained, "other/apm", token=TOKEN, create_pr=True)
    theirs = hub.repositories["model", "other/apm"] = Repository("other/apm", "model")
    theirs.commit("main", {}, "initial commit")
    assert publish(trained, "other/apm", token=TOKEN, create_pr=True) == f"{hub.url}/other/apm/discussions/1"
    assert theirs.files() == {} and "model.safetensors" in theirs.files("refs/pr/1")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "expected a saved model with a config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "apm", "patch_size": 5}'), "image_size"),
        (lambda folder: (folder / "model.safetensors").unlink(), "expected weights in model.safetensors, found none"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "expected a whole safetensors file, got"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "found no preprocessor_config.json"),
        (lambda folder: torch.save({}, folder / "model_15.pth"), "in safetensors only, got model_15.pth"),
    ],
    ids=["no config", "torn config", "config that fits not", "no weights", "torn weights", "no processor", "pickle"],
)
def test_a_folder_without_a_whole_model_is_refused_before_the_hub_is_asked(hub, trained, spoil, message):
    spoil(trained)
    with pytest.raises(ValueError, match=message):
        publish(trained, NAME, token=TOKEN)
    assert hub.requests == []


def test_a_model_that_its_card_warns_of_is_published_by_force_alone(hub, trained):
    write_card(trained, replace(FACTS, warning="it is no better than a constant"))
    with pytest.raises(ValueError, match="without a warning in its card, or --force: it is no better than a constant"):
        publish(trained, NAME, token=TOKEN)
    assert not hub.repositories
    publish(trained, NAME, token=TOKEN, force=True)
    card = hub.model(NAME).files()["README.md"].content.decode()
    assert "**Do not use this model: it is no better than a constant.**" in card and "# " + NAME.split("/")[1] in card


def test_a_model_that_reads_no_pixels_needs_no_image_processor(hub, trained):
    (trained / "preprocessor_config.json").unlink()
    student(trigger_source="embedding").save_pretrained(trained)
    publish(trained, NAME, token=TOKEN)
    assert "model.safetensors" in hub.model(NAME).files()


@pytest.mark.parametrize("token", ["hf_wrong", False], ids=["wrong", "none"])
def test_a_token_that_is_missing_or_wrong_is_named_and_nothing_is_left_behind(hub, trained, token):
    with pytest.raises(PermissionError, match="someone/apm-tiny: the Hub knows no such token, or got none; log in"):
        publish(trained, NAME, token=token)
    assert hub.repositories == {}


def test_a_token_that_may_not_write_is_told_so(hub, trained):
    hub.read_only = True
    with pytest.raises(PermissionError, match="may not write there: This token has no write permission"):
        publish(trained, NAME, token=TOKEN)
    assert hub.repositories == {}


def test_a_commit_that_fails_publishes_nothing(hub, trained):
    hub.broken = True
    with pytest.raises(HfHubHTTPError, match="disks of this Hub are full"):
        publish(trained, NAME, token=TOKEN)
    assert hub.model(NAME).files() == {}


def test_weights_that_arrive_torn_publish_nothing(hub, trained):
    hub.lossy = True
    with pytest.raises(ConnectionError, match="apm-tiny: nothing was published. Error while uploading 'model.safet"):
        publish(trained, NAME, token=TOKEN)
    assert hub.model(NAME).files() == {}


def test_without_network_and_offline_the_hub_is_said_to_be_out_of_reach(hub, trained, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 cannot be reached"):
        publish(trained, NAME, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        publish(trained, NAME, token=TOKEN)


# --- the code that travels ---


MODELS = {name: f"modeling_apm.{model_class.__name__}" for name, model_class in AUTO_CLASSES.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_names_the_code_of_every_auto_class_and_takes_it_along(name, tmp_path):
    fields = {"text_config": CLIPTextConfig(**TOWER, vocab_size=12)} if "ZeroShot" in name else {}
    AUTO_CLASSES[name](student_config(**fields)).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == MODELS | {"AutoConfig": "configuration_apm.APMConfig"}
    files = {path.name for path in tmp_path.glob("*.py")}
    assert files == {"configuration_apm.py", "modeling_apm.py", "position_encoding.py"}


@pytest.mark.parametrize("processor_class", [apm_hf.APMImageProcessor, apm_hf.APMImageProcessorPil])
def test_a_saved_image_processor_names_both_backends_and_takes_them_along(processor_class, tmp_path):
    processor_class().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]
    backends = {
        "torchvision": "image_processing_apm.APMImageProcessor",
        "pil": "image_processing_pil_apm.APMImageProcessorPil",
    }
    assert auto_map == {"AutoImageProcessor": backends}
    assert {path.name for path in tmp_path.glob("*.py")} == {f"{path.split('.')[0]}.py" for path in backends.values()}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_travelling_code_imports_nothing_that_stays_at_home(path):
    known = {"huggingface_hub", "numpy", "PIL", "safetensors", "torch", "transformers"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in TRAVELLING
            # The only form that transformers finds.
            line = ast.get_source_segment(path.read_text(), node).splitlines()[0]
            assert re.match(r"from \.\w+ import ", line)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {module.split(".")[0] for module in modules} <= known


def test_a_subclass_is_saved_as_itself_and_other_entries_are_kept(tmp_path, monkeypatch):
    code = "from apm_hf import APMModel\n\n\nclass MyAPM(APMModel):\n    pass\n"
    (tmp_path / "my_model.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("my_model").MyAPM(student_config())
    model.config.auto_map = {"AutoTokenizer": "elsewhere--tokens.Tokens"}
    model.save_pretrained(tmp_path / "mine")
    own = {"AutoModel": "my_model.MyAPM", "AutoConfig": "configuration_apm.APMConfig"}
    auto_map = json.loads((tmp_path / "mine/config.json").read_text())["auto_map"]
    assert auto_map == own | {"AutoTokenizer": "elsewhere--tokens.Tokens"}
    assert (tmp_path / "mine/my_model.py").read_text() == code


# --- the card -----------------------------------------------------------------------------------------------------


def test_the_card_tells_what_it_was_made_of_and_what_was_measured(tmp_path):
    path = write_card(tmp_path, FACTS)
    assert path == tmp_path / "README.md"
    text = path.read_text()
    for fact in ("# apm-tiny", 'from_pretrained("someone/apm-tiny"', "123,456", FACTS.command, "| steps | 5 |"):
        assert fact in text
    assert "| feature_cosine | 0.8765 |" in text and "| feature_r2 | -0.5000 |" in text
    assert "torch 2.13.0, commit abc1234" in text
    assert "{{" not in text and "}}" not in text and "{%" not in text
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and {"apm", "distillation", "custom_code"} <= set(card.data.tags)
    assert card.data.base_model == "openai/clip-vit-base-patch16" and card.data.datasets == ["detection-datasets/coco"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"feature_cosine": 0.8765, "feature_r2": -0.5} and card.data.model_name == "apm-tiny"


def test_the_metadata_pass_the_hubs_own_check(hub, tmp_path):
    ModelCard.load(write_card(tmp_path, FACTS)).validate()
    assert hub.requests == ["POST /api/validate-yaml"]


@pytest.mark.parametrize(
    ("licences", "expected"),
    [(["mit"], "mit"), (["mit", "mit"], "mit"), (["mit", "cc-by-nc-4.0"], "other"), ([None], "other"), ([], "other")],
)
def test_the_weights_inherit_what_is_known_of_the_teachers_licences(tmp_path, licences, expected):
    teachers = [{"name": f"someone/teacher-{index}", "license": x} for index, x in enumerate(licences)]
    (tmp_path / "config.json").write_text(json.dumps({"distilled_from": teachers}))
    card = ModelCard.load(write_card(tmp_path, FACTS))
    assert card.data.license == expected and (card.data.to_dict().get("license_name") is None) is (expected != "other")
    for teacher in teachers or [{"name": FACTS.teacher, "license": None}]:
        unknown = "unknown: look it up before you use this model"
        assert f"| {teacher['name']} | {teacher['license'] or unknown} |" in card.text
    assert "The code is under Apache-2.0" in card.text


def test_the_card_of_a_run_on_this_computer_names_no_path(tmp_path):
    for name in ("teacher", "photos", "run"):
        (tmp_path / name).mkdir()
    own = {"repo_id": tmp_path / "run", "teacher": tmp_path / "teacher", "dataset": tmp_path / "photos"}
    facts = CardFacts(**vars(FACTS) | {name: str(path) for name, path in own.items()})
    card = write_card(tmp_path / "run", facts).read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in metadata and "datasets" not in metadata
    for text in (card, (tmp_path / "run/card.json").read_text()):
        assert str(tmp_path) not in text and tmp_path.parts[1] + "/" not in text
    assert "| teacher | teacher |" in card and "| data | photos |" in card


@pytest.mark.parametrize(
    ("name", "told"),
    [("org/data:config", "org/data"), ("gpt2", "gpt2"), ("apm_hf's drawn scenes", None), ("a/b/c", None), ("", None)],
)
def test_only_names_of_repositories_are_metadata(tmp_path, name, told):
    card = ModelCard.load(write_card(tmp_path, CardFacts(**vars(FACTS) | {"dataset": name, "teacher": name})))
    assert card.data.base_model == told and card.data.datasets == (None if told is None else [told])


def test_a_model_that_was_not_measured_says_so(tmp_path):
    facts = CardFacts(**{**vars(FACTS), "metrics": {}})
    text = write_card(tmp_path, facts).read_text()
    assert "Nothing was measured." in text and "model-index" not in text


def test_a_published_card_names_the_place_where_the_model_is_loaded_from(hub, trained):
    publish(trained, "someone/elsewhere", token=TOKEN)
    text = hub.model("someone/elsewhere").files()["README.md"].content.decode()
    assert "# elsewhere" in text and 'from_pretrained("someone/elsewhere"' in text and NAME not in text
    assert text.replace("elsewhere", "apm-tiny") == write_card(trained, FACTS).read_text()


def test_a_card_that_somebody_edited_is_published_as_it_is(hub, trained):
    with (trained / "README.md").open("a") as file:
        file.write("\nMind the gap.\n")
    edited = (trained / "README.md").read_bytes()
    assert not change_card(trained, repo_id="someone/elsewhere")
    publish(trained, "someone/elsewhere", token=TOKEN)
    assert hub.model("someone/elsewhere").files()["README.md"].content == edited


def test_the_card_shows_photos_that_may_be_published_where_they_were_drawn(tmp_path):
    assert "islands.png" not in write_card(tmp_path, FACTS).read_text()
    model = student(image_size=24)
    processor = APMImageProcessorPil(size={"height": 24, "width": 24})
    photo(0, size=(90, 60)).save(tmp_path / "mine.png")
    photos, what = card_photos([tmp_path / "mine.png"])
    assert photos[0].size == (448, 448) and "chosen by whoever published" in what
    picture = write_card_picture(tmp_path, APM(model, processor, None), photos)
    assert picture == tmp_path / "islands.png" and picture.read_bytes()[:4] == b"\x89PNG"
    text = write_card(tmp_path, replace(FACTS, photos=what)).read_text()
    assert "](islands.png)" in text and what in text
    with pytest.raises(ValueError, match="nowhere.png"):
        card_photos([tmp_path / "nowhere.png"])


def test_without_photos_scikit_image_s_are_shown_and_without_it_none(monkeypatch):
    pytest.importorskip("skimage")
    photos, what = card_photos()
    assert len(photos) == 2 and "scikit-image's `chelsea` and `coffee`" in what
    monkeypatch.setattr(sample_photos, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="scikit-image"):
        card_photos()


def test_a_published_model_is_given_photos_of_its_publisher(hub, trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    photo(0).save(tmp_path / "mine.png")
    words = ["push", str(trained), NAME, "--card_images", str(tmp_path / "mine.png")]
    assert main(words) == 0
    files = hub.model(NAME).files()
    assert files["islands.png"].content[:4] == b"\x89PNG" and b"](islands.png)" in files["README.md"].content
    student(trigger_source="embedding").save_pretrained(trained)
    assert main(words) == 1 and "expected a student that needs no teacher" in caplog.text


def test_what_a_card_claims_of_its_origins_is_what_the_hub_knows(tmp_path):
    for source, relation in (("conv", "finetune"), ("tokens", "adapter")):
        config = {"trigger_source": source, "distilled_from": [{"name": FACTS.teacher, "license": "own-terms"}]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        data = ModelCard.load(write_card(tmp_path, FACTS)).data.to_dict()
        assert data["base_model_relation"] == relation and data["base_model"] == FACTS.teacher
        assert (data["license"], data["license_name"]) == ("other", "own-terms")
    assert "eprint = {2410.20535}" in (tmp_path / "README.md").read_text()
    (tmp_path / "config.json").write_text(json.dumps({"distilled_from": [{"name": FACTS.teacher, "license": None}]}))
    data = ModelCard.load(write_card(tmp_path, FACTS)).data
    assert (data.license, data.license_link) == ("other", f"https://huggingface.co/{FACTS.teacher}")
    for teacher in ("a teacher of ours", "embedded"):
        card = ModelCard.load(write_card(tmp_path, replace(FACTS, teacher=teacher)))
        assert {"license_link", "base_model_relation", "base_model"}.isdisjoint(card.data.to_dict())
    assert "a small student of apm_hf's photo teacher" in card.text
