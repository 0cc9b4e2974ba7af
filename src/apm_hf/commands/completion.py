"""`apm completion`: a script that lets the shell complete commands, options, choices, files and folders.

It is generated once, by shtab from the parsers: nothing of Python runs when Tab is pressed.
"""

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "fish")
FILES, FOLDERS = ("PHOTO", "FILE", "NAME"), ("FOLDER",)  # a name may be a folder's, or a file's

HELP = "print the script that completes `apm` in your shell"
DESCRIPTION = """
Print a script for the shell, which then completes commands, options, their choices, files and folders on Tab. Print it
again after an update of apm_hf.
"""
EXAMPLES = (
    "apm completion bash > ~/.local/share/bash-completion/completions/apm",
    "apm completion zsh > ~/.zfunc/_apm  # with fpath+=~/.zfunc before compinit in ~/.zshrc",
    "apm completion fish > ~/.config/fish/completions/apm.fish",
)
RESULT = {"shell": "as given", "script": "the whole of it"}
INTERRUPTED = "nothing was printed"
SMALLER = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose script")


def run(options: argparse.Namespace) -> dict[str, Any]:
    import shtab

    from .parsing import build_parsers

    parser, parsers = build_parsers(options.commands)
    for command in parsers.values():
        for action in command._actions:
            if action.metavar in FILES and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=options.shell)
    if not options.json:
        print(script)
    return {"shell": options.shell, "script": script}
