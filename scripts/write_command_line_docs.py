"""Write docs/command_line.md, the reference of `apm`, from the commands themselves.

python scripts/write_command_line_docs.py

A test compares the file with what this makes: run it after every change of a command.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from apm_hf.commands.main import COMMANDS
from apm_hf.commands.parsing import build_parsers, option_help

PATH = Path(__file__).resolve().parents[1] / "docs" / "command_line.md"
INTRODUCTION = """# The command line

Made by `python scripts/write_command_line_docs.py`; `apm COMMAND --help` says the same.

{commands}

For all commands:

* Options may be written with hyphens, too: `--output-dir`. They cannot be abbreviated.
* The result goes to standard output, remarks and progress to standard error. With `--json` the result is one JSON
  object on one line, and nothing else is on standard output; its keys are below. Numbers that are not finite are null.
  With several processes (`torchrun`, `accelerate launch`), the first one prints it.
* Exit status: 0; 1 where something failed, with one line that says what; 2 for wrong usage; 75 where a
  distillation or a cache was stopped and saved (SIGTERM, the first Ctrl-C), 130 after any other Ctrl-C, both with one
  line that says how to go on; 141 where nobody read the output to its end.
* `--debug`, or `APM_DEBUG=1`, shows tracebacks.
* Tokens are no options, since command lines are kept and seen: `hf auth login`, or HF_TOKEN.
* `apm completion SHELL` prints a script that completes all this on Tab.
"""


def document() -> str:
    """The whole file."""
    _, parsers = build_parsers(COMMANDS)
    rows = [(f"[`apm {name}`](#apm-{name})", command.HELP) for name, command in COMMANDS.items()]
    parts = [INTRODUCTION.format(commands=_table(("command", ""), rows))]
    parts += [_section(name, command, parsers[name]) for name, command in COMMANDS.items()]
    parts.append("## Of every command\n\n" + _options(_group(parsers["env"], "output")))
    return "\n".join(parts)


def _section(name: str, command: ModuleType, parser: argparse.ArgumentParser) -> str:
    lines = [f"## apm {name}", "", command.DESCRIPTION.strip(), "", "```bash", *command.EXAMPLES, "```", ""]
    for group in parser._action_groups:
        if group._group_actions and group.title != "output":
            lines += [f"Options {group.title}:", ""] if (group.title or "").startswith("of ") else []
            lines += [_options(group._group_actions)]
    lines += ["With `--json`:", "", _table(("key", ""), [(f"`{key}`", text) for key, text in command.RESULT.items()])]
    return "\n".join([*lines, f"After Ctrl-C: {command.INTERRUPTED}.", ""])


def _options(actions: Iterable[argparse.Action]) -> str:
    rows = [
        (f"`{_spelt(action)}`", _help(action) + ("; required" if action.required and action.option_strings else ""))
        for action in actions
        if action.dest != "help"
    ]
    return _table(("option", ""), rows) if rows else ""


def _help(action: argparse.Action) -> str:
    return option_help(argparse.ArgumentParser(), action)


def _spelt(action: argparse.Action) -> str:
    """Names and placeholders."""
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.nargs == 0:
        value = ""
    else:
        names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        value = " ".join(map(str, names)) + (" ..." if action.nargs == "+" else "")
        value = f"[{value}]" if action.nargs == "?" else value
    return " ".join(filter(None, [", ".join(action.option_strings), value]))


def _group(parser: argparse.ArgumentParser, title: str) -> list[argparse.Action]:
    return next(group._group_actions for group in parser._action_groups if group.title == title)


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *((first, second.replace("|", "\\|")) for first, second in rows)]
    return "\n".join(f"| {first} | {second} |" for first, second in lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(document())
