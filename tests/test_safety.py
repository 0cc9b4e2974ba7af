"""What the package must never do with files, code and secrets that come from elsewhere."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel

import apm_hf
from apm_hf.cli import main
from apm_hf.hub import publish
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from fixtures_hub import TOKEN
from fixtures_tiny import student

SOURCES = sorted(Path(apm_hf.__file__).parent.rglob("*.py"))
SECRET = "hf_" + "thisMustNeverBeSeen" * 2


def calls(path):
    """`(name of what is called, its keyword arguments that are constants)` of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            constants = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            yield ast.unparse(node.func), constants


def wrong_calls(path):
    for name, given in calls(path):
        if name in ("torch.load", "torch.jit.load", "load") and given.get("weights_only") is not True:
            yield f"{name} without weights_only=True"
        if re.fullmatch(r"(pickle|dill|joblib|shelve|marshal)\.(load|loads|open)|yaml\.(load|unsafe_load)", name):
            yield name
        if name in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput") or given.get("shell") is True:
            yield f"{name} of text as a program"
        if name.endswith("np.load") and given.get("allow_pickle") is not False:
            yield "np.load without allow_pickle=False"
        if name.endswith(".extractall") or name.endswith("unpack_archive"):
            yield f"{name}: names in an archive may lead elsewhere"
        if given.get("trust_remote_code"):
            yield f"{name} trusts remote code without being told to"


def test_nothing_that_is_read_can_run():
    found = {path.relative_to(SOURCES[0].parent).as_posix(): list(wrong_calls(path)) for path in SOURCES}
    assert len(found) > 100 and {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_check_itself_sees_what_it_is_for(tmp_path):
    (path := tmp_path / "bad.py").write_text(
        "torch.load(f)\ntorch.load(f, weights_only=False)\npickle.loads(b)\nsubprocess.run(x, shell=True)\n"
        "eval(x)\nnp.load(f)\nz.extractall(p)\nAutoModel.from_pretrained(n, trust_remote_code=True)\nyaml.load(f)\n"
    )
    assert len(list(wrong_calls(path))) == 9
    path.write_text(
        "torch.load(f, weights_only=True)\nmodel.eval()\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)"
    )
    assert list(wrong_calls(path)) == []


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
