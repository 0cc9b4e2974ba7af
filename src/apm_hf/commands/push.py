"""`apm push`: a model folder to the Hub."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import add

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
    add(parser, "--card_images", "as the student sees them; by default, the card's picture stays as it is", nargs="+")
    parser.add_argument("--commit_message", metavar="TEXT", help="first line of the commit")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..publishing.hub import publish

    if options.card_images:
        _draw(options.folder, options.card_images)
    wishes = {name: getattr(options, name) for name in ("private", "revision", "create_pr", "commit_message", "force")}
    given: dict[str, Any] = {name: value for name, value in wishes.items() if value}
    url = publish(options.folder, options.repo_id, **given)
    print(url)
    return {"url": url, "repo_id": options.repo_id, "folder": options.folder}


def _draw(folder: str, photos: Sequence[str]) -> None:
    """Draw these photos for the card, as the student sees them.

    Raises:
        ValueError: for a folder that cannot be published, an unreadable photo, or a student that reads its teacher.
    """
    from ..pair import APM
    from ..publishing.cards import card_photos, change_card, write_card_picture
    from ..publishing.hub import check_folder

    check_folder(Path(folder))
    pictures, what = card_photos(photos)
    apm = APM.load(folder)
    if not apm.bare_model.folds:
        raise ValueError("--card_images: expected a student that needs no teacher; give them to apm distill instead")
    write_card_picture(folder, apm, pictures)
    if not change_card(folder, photos=what):
        logger.warning(f"{folder}: the card was edited, and does not show the new islands.png unless you link it")
