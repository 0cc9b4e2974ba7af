"""The card that is written and what reaches the Hub: the real client against a loopback server.

The server speaks only what an upload of small files needs: create, pre-upload (every file travels in the commit),
commit, and the check of the card's metadata.
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.errors import HfHubHTTPError

from apm_hf.hub import CardFacts, publish, write_card
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from fixtures_tiny import student

TOKEN = "hf_loopback"
FACTS = CardFacts(
    repo_id="someone/apm-tiny",
    teacher="openai/clip-vit-base-patch16",
    dataset="detection-datasets/coco:full",
    command="examples/train.py --max_steps 5",
    steps=5,
    num_parameters=123456,
    metrics={"feature_cosine": 0.87654, "feature_r2": -0.5},
)


class Hub:
    """What the server knows: `{repository: [{path: content}, ...]}`, one entry a commit, and every request."""

    def __init__(self):
        self.commits, self.private, self.requests = {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(self.path)
                if self.path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid username or password."})
                status, answer = hub.answer(self.path.partition("?")[0], body, f"http://{self.headers['Host']}")
                self.answer(status, answer)

            def do_GET(self):
                hub.requests.append(self.path)
                self.answer(404, {"error": "Repository not found"})

            def answer(self, status, data):
                content = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, path, body, url):
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish.get('organization') or 'someone'}/{wish['name']}"
            if name in self.commits:
                return 409, {"error": "You already created this model repo", "url": f"{url}/{name}"}
            self.commits[name] = []
            self.private[name] = wish.get("visibility") == "private" or bool(wish.get("private"))
            return 200, {"url": f"{url}/{name}", "id": name, "name": name}
        name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if action == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return 200, {
                "files": [{key: file[key] for key in ("path", "uploadMode", "shouldIgnore")} for file in files]
            }
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header" and {line["key"] for line in lines[1:]} <= {"file"}
        self.commits[name].append(
            {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        )
        number = len(self.commits[name])
        commit = f"{number:040x}"
        return 200, {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{url}/{name}/commit/{commit}",
            "hookOutput": "",
        }

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    close_session()  # the next one reads the settings above
    yield hub
    close_session()
    hub.close()


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


def test_a_model_is_published_in_one_commit_without_checkpoints_and_logs(hub, trained):
    address = publish(trained, "someone/apm-tiny", token=TOKEN)
    assert list(hub.commits) == ["someone/apm-tiny"]
    (files,) = hub.commits["someone/apm-tiny"]
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoints", "logs"))]
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert files["README.md"] == (trained / "README.md").read_bytes()
    assert address == f"{hub.url}/someone/apm-tiny/commit/{1:040x}"
    assert not hub.private["someone/apm-tiny"]


def test_publishing_again_is_one_more_commit_to_the_same_repository(hub, trained):
    publish(trained, "someone/apm-tiny", token=TOKEN)
    (trained / "metrics.json").write_text("[]")
    publish(trained, "someone/apm-tiny", token=TOKEN)
    assert [files["metrics.json"] for files in hub.commits["someone/apm-tiny"]] == [b"not empty", b"[]"]


def test_a_name_without_user_is_the_users_own_and_may_be_private(hub, trained):
    assert "/someone/apm-mine/commit/" in publish(trained, "apm-mine", token=TOKEN, private=True)
    assert hub.private == {"someone/apm-mine": True}


def test_a_folder_without_a_model_is_refused_before_the_hub_is_asked(hub, tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="folder: expected a saved model with a config.json"):
        publish(tmp_path, "someone/apm-tiny", token=TOKEN)
    with pytest.raises(ValueError, match="folder: expected a saved model with a config.json"):
        publish(tmp_path / "nowhere", "someone/apm-tiny", token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_wrong", None], ids=["wrong", "none"])
def test_a_token_that_is_missing_or_wrong_is_named_and_nothing_is_left_behind(hub, trained, token):
    with pytest.raises(HfHubHTTPError, match="401|[Tt]oken|username"):
        publish(trained, "someone/apm-tiny", token=token)
    assert hub.commits == {}


# --- the card -----------------------------------------------------------------------------------------------------


def test_the_card_tells_what_it_was_made_of_and_what_was_measured(tmp_path):
    path = write_card(tmp_path, FACTS)
    assert path == tmp_path / "README.md"
    text = path.read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "transformers" and "distillation" in metadata["tags"]
    assert metadata["base_model"] == "openai/clip-vit-base-patch16"
    assert metadata["datasets"] == ["detection-datasets/coco"]
    assert metadata["license"] == "apache-2.0"
    for fact in ("# apm-tiny", 'from_pretrained("someone/apm-tiny")', "123,456", FACTS.command, "| steps | 5 |"):
        assert fact in text
    assert "| feature_cosine | 0.8765 |" in text and "| feature_r2 | -0.5000 |" in text
    assert "{{" not in text and "}}" not in text
    assert ModelCard.load(path).data.base_model == "openai/clip-vit-base-patch16"


def test_the_card_of_a_run_on_this_machine_names_no_path(tmp_path):
    for name in ("teacher", "photos", "run"):
        (tmp_path / name).mkdir()
    facts = CardFacts(
        **{
            **vars(FACTS),
            "repo_id": str(tmp_path / "run"),
            "teacher": str(tmp_path / "teacher"),
            "dataset": str(tmp_path / "photos"),
        }
    )
    text = write_card(tmp_path / "run", facts).read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in metadata and "datasets" not in metadata
    assert str(tmp_path) not in text and tmp_path.parts[1] + "/" not in text
    assert "| teacher | teacher |" in text and "| data | photos |" in text


def test_a_model_that_was_not_measured_says_so(tmp_path):
    facts = CardFacts(**{**vars(FACTS), "metrics": {}})
    assert "Nothing was measured." in write_card(tmp_path, facts).read_text()
