"""Every code block of the README and of docs/ does what it says: Python is run, commands are read by their parsers.

The Python blocks of a file run in order, in one namespace, in a folder with two pictures and the embedded model,
beside a Hub on 127.0.0.1. Commands that train for hours are not run: their programs must exist and know every option.
"""

import argparse
import ast
import gc
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apm_hf.assets import DEMO_MODEL
from apm_hf.commands.main import COMMANDS
from apm_hf.commands.parsing import parse
from apm_hf.data.scenes import SceneDataset
from apm_hf.teachers import families as teacher_families
from fixtures_hub import TOKEN

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```([^`\n]*)\n(.*?)^ *```", re.S | re.M)
SHELL = ("bash", "sh", "")
PROGRAM = re.compile(r"(^|\s)(apm|(?:examples|benchmarks|scripts)/[\w/]+\.py)\s")


def blocks(path, *languages):
    return [text for language, text in BLOCK.findall(path.read_text()) if language in languages]


def commands(path):
    """Words of every command that starts `apm` or a script of this project, whatever launches it."""
    for block in blocks(path, *SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := PROGRAM.search(line):
                yield shlex.split(re.split(r"[|>&]", line[found.start(2) :])[0], comments=True)


# Of Gradio's servers, when they are closed.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", [p for p in FILES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run_as_they_stand(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("src", "examples"):
        Path(name).symlink_to(ROOT / name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.user = "user"
    shutil.copytree(DEMO_MODEL, "apm")
    for index, name in enumerate(("photo.jpg", "other.jpg")):
        SceneDataset(2, seed=99)[index]["image"].save(name)
    families = [teacher_families.VISION_TOWERS, teacher_families.DUAL_ENCODERS]  # a guide adds one
    before = [dict(table) for table in families]
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks(path, "python")):
        exec(compile(block, f"{path.name}, block {number}", "exec"), namespace)
    for table, kept in zip(families, before, strict=True):
        table.clear()
        table.update(kept)
    namespace.clear()
    gc.collect()  # what Gradio leaves open is warned of here, not in the next test


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_understood(path):
    for program, *words in commands(path):
        if program == "apm":
            try:
                parse(COMMANDS, words, version="")
            except SystemExit as refused:
                assert refused.code == 0, f"apm {shlex.join(words)}"
            continue
        script = ROOT / program
        assert script.exists(), program
        known = options_of(script)
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{program}: {unknown}"


_OPTIONS: dict = {}


def options_of(script):
    """What `--help` says, without a process of its own."""
    if script not in _OPTIONS:
        spec = importlib.util.spec_from_file_location(f"{script.stem}_documented", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        printed = []
        patch = pytest.MonkeyPatch()
        patch.syspath_prepend(script.parent)  # where it finds its neighbours
        spec.loader.exec_module(module)
        patch.setattr(
            argparse.ArgumentParser, "print_help", lambda parser, file=None: printed.append(parser.format_help())
        )
        patch.setattr(sys, "argv", [str(script), "--help"])
        try:
            module.main()
        except SystemExit:
            pass
        finally:
            patch.undo()
        _OPTIONS[script] = set(re.findall(r"--\w+", " ".join(printed)))
    return _OPTIONS[script]


def test_links_between_pages_lead_somewhere():
    for path in FILES:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            if not re.match(r"\w+:", target):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_tree_names_every_folder_of_the_package():
    tree = (ROOT / "CONTRIBUTING.md").read_text().partition("## The tree")[2].partition("## Rules")[0]
    folder = ROOT / "src/apm_hf"
    ignored = {"__init__.py", "py.typed"}
    for path in folder.iterdir():
        if path.suffix == ".py" and path.name not in ignored:
            assert path.name in tree, path.name
        elif path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in tree, path.name
    ours = {path.name for part in ("src", "examples", "benchmarks", "scripts") for path in (ROOT / part).rglob("*.py")}
    ours |= {path.name for path in ROOT.glob("*.py")}
    assert {name for name in re.findall(r"\b([a-z_0-9]+\.py)\b", tree) if name not in ours} == set()


DIRECTIVE = re.compile(r"^::: (apm_hf[\w.]*)$", re.M)


def test_the_reference_has_every_public_name_once_and_no_other():
    import apm_hf

    named = [name for path in (ROOT / "docs/api").glob("*.md") for name in DIRECTIVE.findall(path.read_text())]
    assert sorted(set(named)) == sorted(named)
    assert {f"apm_hf.{name}" for name in apm_hf.__all__} <= set(named)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site/quickstart.html").exists()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"\S+\.md", navigation))


def texts_of(module_file):
    """All strings in a Python file; what an f-string fills in is left out."""
    for node in ast.walk(ast.parse(module_file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_in_the_questions_are_those_of_the_sources():
    """`title="MODULE"` names the library's module that prints it; without a title it is this package."""
    ours = [text for path in (ROOT / "src").rglob("*.py") for text in texts_of(path)]
    quoted = re.findall(r'^```text(?: title="([\w.]+)")?\n(.*?)^```', (ROOT / "docs/faq.md").read_text(), re.S | re.M)
    assert len(quoted) > 15
    for module, message in quoted:
        texts = list(texts_of(Path(importlib.util.find_spec(module).origin))) if module else ours
        for part in message.strip().split("…"):
            assert any(part.strip() in text for text in texts), part


def test_nothing_in_the_documentation_names_a_path_of_a_computer():
    for path in FILES:
        text = path.read_text()
        assert str(ROOT) not in text and os.path.expanduser("~/") not in text, path.name
