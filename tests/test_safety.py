"""What the package must never do with files, code and secrets that come from elsewhere."""

import ast
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel

import apm_hf
from apm_hf.commands.main import main
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.publishing.hub import publish
from apm_hf.runs.files import plain_name
from fixtures_hub import TOKEN
from fixtures_tiny import student

SOURCE = Path(apm_hf.__file__).parent
SECRET = "hf_" + "thisMustNeverBeSeen" * 2


def words_of(node):
    """Keyword arguments of a call, or entries of a dict, as they are written."""
    if isinstance(node, ast.Call):
        return {one.arg: ast.unparse(one.value) for one in node.keywords}
    pairs = zip(node.keys, node.values, strict=True)
    return {key.value: ast.unparse(value) for key, value in pairs if isinstance(key, ast.Constant)}


def what_is_wrong(node):
    """What a call, or a dict, does that it must not."""
    given, name = words_of(node), ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if name == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads"):
        return name
    if name == "np.load" and "allow_pickle" not in given:
        return "np.load without allow_pickle=False"
    for option in ("trust_remote_code", "allow_pickle", *(["shell"] if name.startswith("subprocess") else [])):
        if given.get(option, "False") != "False":
            return f"{option}={given[option]}"
    if name.startswith(("logger.", "logging.")):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return "a token in the log" if names & {"token", "hf_token"} else None
    return None


def complaints(source):
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call | ast.Dict))
    return [f"line {node.lineno}: {wrong}" for node in nodes if (wrong := what_is_wrong(node))]


def test_our_source_runs_no_shell_reads_no_pickle_and_trusts_no_code():
    assert {path.name: found for path in SOURCE.rglob("*.py") if (found := complaints(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': given}",
        "np.load(path)",
        "logger.info(f'with {token}')",
    ],
)
def test_the_watch_over_our_source_can_fail(source):
    assert complaints(source)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "was here")


def test_weights_that_would_run_code_are_not_even_opened(tmp_path):
    trap, folder = tmp_path / "trap", tmp_path / "model"
    student().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": _Payload(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        apm_hf.APMModel.from_pretrained(folder)
    assert not trap.exists()
    with pytest.raises(Exception, match="weights_only"):  # asked for, they are read without running
        apm_hf.APMModel.from_pretrained(folder, use_safetensors=False)
    assert not trap.exists()
    (folder / "pytorch_model.bin").rename(tmp_path / "model_15.pth")
    arguments = ["convert", str(tmp_path / "model_15.pth"), str(tmp_path / "converted")]
    assert main(arguments) == 1 and not trap.exists() and not (tmp_path / "converted").exists()


def test_code_beside_a_model_that_calls_itself_apm_does_not_run(tmp_path):
    student().save_pretrained(tmp_path)
    (tmp_path / "modeling_apm.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w').close()\n")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_apm.APMModel"
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is apm_hf.APMModel and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("text", ["../../etc/passwd", "..", "", "/abs", "a/b:c", "a\\..\\b", "a\0b"])
def test_names_from_data_stay_in_their_folder(tmp_path, text):
    path = tmp_path / plain_name(text)
    assert path.resolve().parent == tmp_path.resolve() and path.name == path.resolve().name


@pytest.mark.parametrize("token", [SECRET, TOKEN])
def test_a_token_is_in_no_output_file_or_error(hub, tmp_path, monkeypatch, caplog, capfd, token):
    folder = tmp_path / "model"
    student().save_pretrained(folder)
    APMImageProcessorPil().save_pretrained(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level("DEBUG")
    status = main(["push", str(folder), "someone/apm-tiny", "--verbose", "--debug"]) if token == TOKEN else None
    if token == SECRET:  # which the Hub does not know
        with pytest.raises(PermissionError) as raised:
            publish(folder, "someone/apm-tiny", token=token)
        assert token not in repr(raised.value) + str(raised.value)
    else:
        assert status == 0
    main(["env", "--json"])
    seen = "".join(capfd.readouterr()) + caplog.text
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert token not in seen and token.encode() not in written
    assert str(constants.HF_TOKEN_PATH) not in seen
