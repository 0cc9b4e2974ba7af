"""What all commands of `apm` have in common: help and examples, usage, errors, `--json`, completion, the reference."""

import errno
import importlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, errors

import apm_hf
from apm_hf import configuration_apm, ttt
from apm_hf.commands import app, completion, distill, env, push
from apm_hf.commands.console import as_json
from apm_hf.commands.errors import explain
from apm_hf.commands.main import COMMANDS, main
from apm_hf.commands.options import SHARED
from apm_hf.commands.parsing import build_parsers, parse
from apm_hf.distillation import recipe as training
from apm_hf.evaluation.labels import suites
from apm_hf.islands import colours, interpolation
from apm_hf.publishing import hub

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def parsers():
    return build_parsers(COMMANDS)[1]


def option(parser, name):
    return next(action for action in parser._actions if name in action.option_strings)


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_what_a_command_does_with_examples_and_the_keys_of_its_result(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    printed, command = capsys.readouterr().out, COMMANDS[name]
    assert stopped.value.code == 0
    assert " ".join(command.DESCRIPTION.split()) in " ".join(printed.split())
    assert command.EXAMPLES and all(line in printed for example in command.EXAMPLES for line in example.split("\n"))
    assert command.RESULT and all(f"\n  {key} " in printed for key in command.RESULT)
    for word in ("--json", "--quiet", "--verbose", "--debug"):
        assert word in printed
    assert str(Path.home()) not in printed and apm_hf.__path__[0] not in printed


@pytest.mark.parametrize("example", [line for command in COMMANDS.values() for line in command.EXAMPLES])
def test_examples_are_commands_that_can_be_given(example):
    program, *words = shlex.split(example.replace("\\\n", " "), comments=True)
    words = words[: words.index(">")] if ">" in words else words  # the shell's
    options = parse(COMMANDS, words, version="")
    assert program == "apm" and options.run is COMMANDS[words[0]].run


def test_the_same_option_has_the_same_form_and_meaning_everywhere(parsers):
    seen = {}
    for name, parser in parsers.items():
        for action in parser._actions:
            for spelt in action.option_strings:
                assert "-" not in spelt.lstrip("-"), f"{name}: {spelt}"
                if spelt in SHARED:
                    assert action.help.startswith(SHARED[spelt]["help"]), f"{name} {spelt}: {action.help}"
                if spelt == "--preset":  # recipes and architectures
                    continue
                form = (action.metavar, action.type or str, action.choices)
                assert seen.setdefault(spelt, form) == form, f"{name} {spelt}"
    assert {"--teacher", "--model", "--output_dir", "--seed", "--batch_size", "--steps", "--json"} <= set(seen)


def test_without_a_command_the_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "distill" in out and "classify" in out


def test_options_come_from_a_file_and_what_is_typed_overrides_them(tmp_path, parsers):
    path = tmp_path / "run.yaml"
    lines = (
        "teacher: org/clip",
        "max-steps: 7",
        "level_layers: [1, 3]",
        "resume: true",
        "jitter: false",
        "output_dir: a",
    )
    path.write_text("\n".join(lines))
    arguments = ["distill", "--config", str(path), "--dataset", "photos", "--output_dir", "b"]
    options = parse(COMMANDS, arguments, version="0")
    assert (options.teacher, options.max_steps, options.level_layers) == ("org/clip", 7, [1, 3])
    assert options.resume and not options.jitter and options.output_dir == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_imags: 7", "unknown option --max_imags; did you mean --max_images"),
        ("- teacher", "expected a YAML mapping of options"),
        ("a: [", "while parsing"),
        ("[" * 100_000, "maximum recursion depth"),
        ("data: &a [x, y]\nmethods: [*a, *a]", "methods: expected a value or a list of values"),
        (None, "No such file"),
    ],
)
def test_a_file_of_options_that_cannot_be_used_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse(COMMANDS, ["evaluate", "--output_dir", "x", "--config", str(path)], version="0")
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_file_of_options_is_a_file(capsys):
    with pytest.raises(SystemExit):
        parse(COMMANDS, ["evaluate", "--output_dir", "x", "--config", "/dev/zero"], version="0")
    assert "Expected a text file of options, got /dev/zero, which is no regular file" in capsys.readouterr().err


def test_no_option_takes_a_token(parsers):
    spelt = [name for parser in parsers.values() for action in parser._actions for name in action.option_strings]
    assert spelt and not [name for name in spelt if "token" in name]


def test_choices_are_the_library_s(parsers):
    def choices(command, name):
        return set(option(parsers[command], name).choices)

    assert choices("classify", "--preset") == set(ttt.PRESETS)
    assert choices("distill", "--preset") == set(configuration_apm.PRESETS)
    assert choices("islands", "--colours") == set(colours.METHODS)
    assert choices("interpolate", "--blending") == set(interpolation.BLENDINGS)
    assert choices("interpolate", "--patches") == set(interpolation.PATCHES)
    assert choices("evaluate", "--suite") == {*suites.SUITES, suites.CUSTOM}


def test_the_reference_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "write_command_line_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PATH.read_text() == script.document(), "run scripts/write_command_line_docs.py"


# --- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clasify", "a.png"], "apm: error: unknown command 'clasify'; did you mean classify?"),
        (["zzz"], "unknown command 'zzz'\n"),
        (["islands", "a.png", "--outptu-dir", "x"], "unknown option --outptu_dir; did you mean --output_dir?"),
        (["islands", "a.png", "--output=x"], "unknown option --output; did you mean --output_dir?"),
        (["evaluate", "--output_dir", "x", "--sed", "1"], "did you mean --seed"),
        (["classify", "a.png", "--preset", "slow"], "--preset: invalid choice: 'slow' (choose from"),
        (["islands", "a.png", "--output_dir", "x", "--colours", "rainbow"], "--colours: invalid choice: 'rainbow'"),
        (["interpolate", "a", "b", "--output_dir", "x", "--blending", "cubic"], "--blending: invalid choice"),
        (["push", "folder", "user/name", "--token", "hf_x"], "unknown option --token"),
        (["distill", "--teacher", "x"], "required: --dataset, --output_dir"),
        (["env", "too", "much"], "unrecognized arguments: too much"),
    ],
)
def test_wrong_usage_is_status_2_with_a_suggestion(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    assert printed.err.startswith("usage: apm") and message in printed.err


def test_options_may_be_written_with_hyphens_and_values_stay_as_they_are():
    words = ["islands", "my-photo.png", "--output-dir=my-run", "--text", "a-b", "--point", "-0.5", "0.2", "-q"]
    options = parse(COMMANDS, words, version="")
    assert (options.photos, options.output_dir, options.text) == (["my-photo.png"], "my-run", ["a-b"])
    assert options.point == [[-0.5, 0.2]] and options.quiet and not options.json


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"apm_hf {apm_hf.__version__}\n"


# --- what goes wrong ----------------------------------------------------------------------------------------------


def answer(kind, status, path, **settings):
    """An error as the Hub's client raises it."""
    client = importlib.import_module(errors.Response.__module__.split(".")[0])
    response = client.Response(status, request=client.Request("GET", f"https://huggingface.co{path}"))
    return kind(f"{status} Client Error. (Request ID: x)\n\nfor url", response=response, **settings)


def raised(error, cause):
    error.__cause__ = cause
    return error


GATED = answer(errors.GatedRepoError, 403, "/org/gated/resolve/main/config.json")
MISSING = answer(errors.RepositoryNotFoundError, 404, "/api/models/org/missing/tree/main")
TRANSPORT = type("ConnectError", (type("TransportError", (Exception,), {"__module__": "httpx2"}),), {})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GATED, ["org/gated is gated", "hf auth login"]),
        (raised(OSError("A gated repo.\nMake sure"), GATED), ["org/gated is gated"]),
        (MISSING, ["org/missing is neither a folder here nor on the Hub", "hf auth login"]),
        (
            raised(OSError("Could not load the model of teacher 'x'.\nlong"), MISSING),
            ["teacher 'x'. org/missing is neither"],
        ),
        (answer(errors.RevisionNotFoundError, 404, "/org/name/resolve/v9/config.json"), ["org/name has no such rev"]),
        (answer(errors.HfHubHTTPError, 401, "/api/repos/create", server_message="Invalid"), ["token", "(Invalid)"]),
        (answer(errors.HfHubHTTPError, 403, "/api/models/org/name/commit/main"), ["org/name", "right to write"]),
        (answer(errors.HfHubHTTPError, 429, "/api/models/org/name"), ["too often"]),
        (answer(errors.HfHubHTTPError, 503, "/api/models/org/name"), ["503", "later"]),
        (errors.OfflineModeIsEnabled("no"), ["HF_HUB_OFFLINE is set"]),
        (errors.LocalEntryNotFoundError("no"), ["cannot be reached"]),
        (errors.LocalTokenNotFoundError("no"), ["hf auth login"]),
        (TRANSPORT("refused"), ["the Hub cannot be reached (refused)"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["out of memory: a smaller --batch_size needs less"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["a smaller --batch_size"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "big.bin"), ["the disk is full (writing big.bin)"]),
        (RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"), ["the disk is full"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), ["a.txt: No such file"]),
        (ModuleNotFoundError("No module named 'gradio'"), ["'gradio'", "apm env"]),
        (ValueError("steps: expected\n  a number"), ["steps: expected a number"]),
    ],
)
def test_what_can_be_mended_is_one_line_that_says_how(error, words):
    line = explain(error, smaller="a smaller --batch_size")
    assert line and "\n" not in line and all(word in line for word in words), line


def test_a_defect_is_no_user_s_to_mend():
    assert explain(KeyError("x")) is None and explain(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize("offline", [True, False])
def test_offline_mode_is_named_where_it_is_the_reason(offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert ("HF_HUB_OFFLINE" in explain(errors.LocalEntryNotFoundError("no"))) is offline


@pytest.fixture
def broken_env(monkeypatch):
    """Make `apm env` raise."""

    def break_with(error):
        def environment():
            raise error

        monkeypatch.setattr(env, "environment", environment)

    monkeypatch.delenv("APM_DEBUG", raising=False)
    return break_with


def test_an_error_is_one_line_and_a_traceback_only_where_that_is_asked_for(broken_env, monkeypatch, caplog, capsys):
    broken_env(ValueError("it is\nbroken"))
    assert main(["env", "--json"]) == 1 and not capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records] == ["apm env: it is broken"]
    with pytest.raises(ValueError, match="broken"):
        main(["env", "--debug"])
    monkeypatch.setenv("APM_DEBUG", "1")
    with pytest.raises(ValueError, match="broken"):
        main(["env"])
    broken_env(KeyError("ours"))
    monkeypatch.delenv("APM_DEBUG")
    with pytest.raises(KeyError):
        main(["env"])


def test_nobody_reading_the_output_is_no_error(broken_env, caplog):
    broken_env(BrokenPipeError())
    assert main(["env"]) == 141 and not caplog.records


def test_ctrl_c_says_how_to_go_on(monkeypatch, caplog):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    words = ["distill", "--teacher", "a", "--dataset", "b", "--output_dir", "c"]
    assert main(words) == 130
    (record,) = caplog.records
    assert (
        record.getMessage() == f"apm distill: interrupted; {distill.INTERRUPTED}" and "--resume" in distill.INTERRUPTED
    )


def test_quiet_silences_remarks_and_progress_and_leaves_no_trace(monkeypatch, caplog):
    from transformers.utils import logging as transformers_logging

    seen = []

    def environment():
        logger = logging.getLogger("apm_hf")
        logger.info("remark")
        logger.warning("warning")
        seen.append(transformers_logging.is_progress_bar_enabled())
        return {}

    monkeypatch.setattr(env, "environment", environment)
    level = logging.getLogger("apm_hf").level
    for words, is_terminal in ((["--quiet"], True), ([], True), ([], False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert main(["env", "--json", *words]) == 0
    assert [record.getMessage() for record in caplog.records] == ["warning", *["remark", "warning"] * 2]
    assert seen == [False, True, False] and logging.getLogger("apm_hf").level == level


# --- results ------------------------------------------------------------------------------------------------------


def test_the_result_is_strict_json():
    told = json.loads(as_json({"a": Path("x/y"), "b": float("nan"), "c": [(1, float("inf"))], 3: {"d": True}}))
    assert told == {"a": str(Path("x/y")), "b": None, "c": [[1, None]], "3": {"d": True}}


def test_the_environment_names_neither_user_nor_home_nor_token(monkeypatch, tmp_path, capsys):
    home = tmp_path / "home" / "rosalind"
    (home / "hub").mkdir(parents=True)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("LOGNAME", "rosalind")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("apm_hf.assets.PHOTO_MODEL", str(tmp_path / "rosalind" / "apm"))
    assert main(["env", "--json"]) == 0 and main(["env"]) == 0
    printed = capsys.readouterr().out
    line, text = printed.split("\n", 1)
    told = json.loads(line)
    assert set(told) == set(env.RESULT)
    assert "rosalind" not in printed and "hf_secret" not in printed and str(home) not in printed
    assert told["hub"]["cache"] == os.path.join("~", "hub") and told["hub"]["logged_in"] is True
    assert told["embedded"]["model"] == str(tmp_path / "USER" / "apm")
    assert told["teachers"]["vectors"] == {"name": "facebook/dinov2-small", "cached": False}
    assert told["versions"]["apm_hf"] == apm_hf.__version__ and told["versions"]["torch"] == version("torch")
    assert told["devices"][0]["type"] == "cpu" and told["devices"][0]["memory_bytes"] > 2**28
    assert told["defaults"]["device"] in [device["type"].partition(":")[0] for device in told["devices"]]
    for word in (version("torch"), "default device", "image backend"):
        assert word in text


def test_a_missing_extra_is_named_with_the_line_that_adds_it(monkeypatch, capsys):
    lines = ["torch>=2.6", "gradio>=5; extra == 'app'", "none-such; extra == 'app'", "apm_hf[app]; extra == 'demo'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    monkeypatch.setattr(env, "_version", {"gradio": "5.1"}.get)
    assert env._extras() == {
        "app": {"packages": {"gradio": "5.1", "none-such": None}, "install": 'pip install "apm_hf[app]"'}
    }


def test_push_hands_over_what_was_asked_for_and_prints_the_address(monkeypatch, capsys):
    asked = []

    def publish(*arguments, **settings):
        asked.append((arguments, settings))
        return "https://huggingface.co/user/name/commit/1"

    monkeypatch.setattr(hub, "publish", publish)
    assert main(["push", "runs/x", "user/name"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/user/name/commit/1\n"
    words = ["--private", "--revision", "v1", "--create-pr", "--commit_message", "First", "--json"]
    assert main(["push", "runs/x", "user/name", *words]) == 0
    assert asked == [
        (("runs/x", "user/name"), {}),
        (
            ("runs/x", "user/name"),
            {"private": True, "revision": "v1", "create_pr": True, "commit_message": "First"},
        ),
    ]
    told = json.loads(capsys.readouterr().out)
    assert set(told) == set(push.RESULT) and told["url"].endswith("/commit/1")


def test_the_app_is_served_as_asked_for(monkeypatch, capsys):
    asked = []

    def launch(**settings):
        asked.append(settings)
        print("Running on local URL")
        return SimpleNamespace(local_url="http://127.0.0.1:8000/")

    monkeypatch.setitem(sys.modules, "apm_hf.app", SimpleNamespace(launch=launch))
    assert main(["app", "--model", "m", "--port", "8000", "--json"]) == 0
    assert asked == [{"model": "m", "teacher": None, "port": 8000, "share": False}]
    told = json.loads(capsys.readouterr().out)
    assert set(told) == set(app.RESULT) and told["url"] == "http://127.0.0.1:8000/"


# --- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_completion_names_commands_options_and_choices(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "output_dir", "linear", "spherical"):
        assert word in script
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script.removesuffix("\n")}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_choices_files_and_folders(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "apm.bash").write_text(capsys.readouterr().out)
    (tmp_path / "photo.png").touch()
    (tmp_path / "phantasy").mkdir()
    lines = ["apm cl", "apm islands --out", "apm classify --preset ", "apm classify ph", "apm islands --output_dir ph"]
    program = ["source ./apm.bash"] + [
        "COMP_WORDS=(%s); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); "
        '_shtab_apm apm "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; echo "${COMPREPLY[*]}"'
        % (line + '""' if line.endswith(" ") else line)
        for line in lines
    ]
    done = subprocess.run(["bash", "-c", "\n".join(program)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = [set(line.split()) for line in done.stdout.splitlines()]
    assert words == [
        {"classify"},
        {"--output_dir"},
        {"fast", "paper"},
        {"photo.png", "phantasy"},
        {"phantasy"},
    ]
