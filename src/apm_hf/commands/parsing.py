"""How a command line is read: parsers made of command modules, suggestions for what is misspelt, hyphens as well."""

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

from .options import NUMBER, add_output_options

PROGRAM = "apm"
DESCRIPTION = "The Asynchronous Perception Machine (arXiv:2410.20535): distil, adapt at test time, see islands."


def parse(commands: Mapping[str, ModuleType], arguments: Sequence[str], *, version: str) -> argparse.Namespace:
    """Parse a command line; the options come with `command`, all `commands`, `arguments` and `given`.

    `arguments` are those that were given, typed or in the file behind `--config`; `given` are their options' names.

    Options are added to the chosen command's parser alone: some ask for libraries that take seconds to load.

    Raises:
        SystemExit: 2 for wrong usage, 0 after `--help` and `--version`.
    """
    arguments = with_underscores(arguments)
    if not arguments:
        build_parsers(commands, version=version, only="")[0].print_help()
        raise SystemExit(0)
    name = next((word for word in arguments if not word.startswith("-")), "")
    parser, parsers = build_parsers(commands, version=version, only=name)
    if name and name not in parsers:
        parser.error(f"unknown command {name!r}{_suggestion(name, parsers)}")
    if name:
        place = arguments.index(name) + 1
        _refuse_unknown(parsers[name], arguments[place:])
        if "--config" in parsers[name]._option_string_actions:
            try:
                own = _from_file(arguments[place:])
            except (OSError, ValueError) as error:
                parsers[name].error(str(error))
            _refuse_unknown(parsers[name], own)
            arguments = [*arguments[:place], *own, *arguments[place:]]  # what is typed comes last, and counts
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = frozenset(word.partition("=")[0][2:] for word in arguments[:end] if _is_option(word))
    start = argparse.Namespace(
        commands=commands, arguments=arguments, given=given, json=False, quiet=False, verbose=False, debug=False
    )
    return parser.parse_args(arguments, start)


def _from_file(arguments: Sequence[str]) -> list[str]:
    """Return the options that the file behind `--config` holds, as they would be typed.

    Raises:
        ValueError, OSError: for what is no YAML mapping of options to values, or no file.
    """
    import yaml  # type: ignore[import-untyped]

    from ..runs.files import read_text

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(list(arguments))[0].config
    if path is None:
        return []
    try:
        entries = yaml.safe_load(read_text(path, "options"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise ValueError(f"--config: expected a YAML mapping of options to values in {path}")
    words: list[str] = []
    for key, value in entries.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, list | dict) for one in values):  # whose text could be without end
            raise ValueError(f"--config: {key}: expected a value or a list of values in {path}")
        words.append("--" + key.replace("-", "_"))
        if value is not True:
            words += [str(one) for one in values]
    return words


def build_parsers(
    commands: Mapping[str, ModuleType], *, version: str = "", only: str | None = None
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Build the parser of `apm`, and those of its commands by name.

    Args:
        only: the command whose options are added; None adds those of all.
    """
    # Abbreviations would change their meaning with every option that comes.
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"apm_hf {version}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        options = subparsers.add_parser(
            name, help=command.HELP, allow_abbrev=False, formatter_class=_Formatter, add_help=only in (None, name)
        )
        if only in (None, name):
            options.description = _paragraph(command.DESCRIPTION)
            options.epilog = _epilog(command)
            command.add_options(options)
            add_output_options(options)
            for action in options._actions:
                if action.metavar is None and action.choices is None and action.type in NUMBER:
                    action.metavar = NUMBER[action.type]
            options.usage = _usage(options)
            options.set_defaults(run=command.run)
    return parser, subparsers.choices


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--output-dir=my-run` -> `--output_dir=my-run`; values, and all behind a lone `--`, stay as they are."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words = []
    for word in arguments[:end]:
        name, equals, value = word.partition("=")
        if _is_option(name):
            name = "--" + name[2:].replace("-", "_")
        words.append(name + equals + value)
    return [*words, *arguments[end:]]


def option_help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """An option's help with its default, as `--help` prints it."""
    formatter = _Formatter(parser.prog)
    return formatter._expand_help(action) if action.help else ""


def _usage(parser: argparse.ArgumentParser) -> str:
    """Return the usage line: the arguments that are required. The help lists all options below it."""
    words = [parser.prog, "[options]"]
    for action in parser._actions:
        if action.option_strings and action.required:
            words += [action.option_strings[0], str(action.metavar)]
        elif not action.option_strings:
            dots = " ..." if action.nargs == "+" else ""
            choices = "{" + ",".join(map(str, action.choices or ())) + "}"
            words += [f"{action.metavar or choices}{dots}"] * int(action.nargs if isinstance(action.nargs, int) else 1)
    return " ".join(map(str, words))


def _is_option(word: str) -> bool:
    return word.startswith("--") and " " not in word  # argparse too takes a word with spaces for a value


def _refuse_unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Ahead of argparse, which would speak of what is missing first, though it is only misspelt."""
    known = [name for name in parser._option_string_actions if "-" not in name[2:]]
    for word in arguments[: arguments.index("--") if "--" in arguments else None]:
        name = word.partition("=")[0]
        if _is_option(name) and name not in known:
            parser.error(f"unknown option {name}{_suggestion(name, known)}")


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples; tells defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        silent = default is None or default is False or default == argparse.SUPPRESS or default == []
        if silent or action.help is None or "default" in action.help:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else "%(default)s"
        return f"{action.help} (default: {shown})"


def _paragraph(text: str, indent: str = "", first: str = "") -> str:
    width = min(shutil.get_terminal_size().columns, 100) - 2
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )


def _epilog(command: ModuleType) -> str:
    width = max(map(len, command.RESULT))
    keys = [_paragraph(text, " " * (width + 4), f"  {key:<{width}}  ") for key, text in command.RESULT.items()]
    return "\n".join(["examples:", *(f"  {line}" for line in command.EXAMPLES), "", "keys with --json:", *keys])
