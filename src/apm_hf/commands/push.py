"""`apm push`: a model folder to the Hub."""

import argparse
import logging
from typing import Any

logger = logging.getLogger("apm_hf")

HELP = "publish a model folder on the Hub, with its card"
DESCRIPTION = """
Publish a model folder on the Hub in one commit, so that nothing is ever half-published. The token is the one of
`hf auth login`, or HF_TOKEN: it is no option, since command lines are kept in histories and shown in process lists.
"""
EXAMPLES = (
    "apm push runs/photos user/apm-photos --private",
    "apm push runs/photos user/apm-photos --create_pr --commit_message 'Distilled for longer'",
)
RESULT = {
    "url": "of the commit or the pull request",
    "repo_id": "of the repository",
    "folder": "what was published",
}
INTERRUPTED = "either the whole commit is on the Hub or nothing; the same command tries again"
SMALLER = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a saved model")
    parser.add_argument("repo_id", metavar="REPOSITORY", help="user/name, or a name among your own; made if need be")
    parser.add_argument("--private", action="store_true", help="make a private repository, where there is none yet")
    parser.add_argument("--revision", metavar="NAME", help="branch to commit to (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--force", action="store_true", help="publish a model too whose card warns of it")
    parser.add_argument("--commit_message", metavar="TEXT", help="first line of the commit")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..publishing.hub import publish

    wishes = {name: getattr(options, name) for name in ("private", "revision", "create_pr", "commit_message", "force")}
    given: dict[str, Any] = {name: value for name, value in wishes.items() if value}
    url = publish(options.folder, options.repo_id, **given)
    print(url)
    return {"url": url, "repo_id": options.repo_id, "folder": options.folder}
