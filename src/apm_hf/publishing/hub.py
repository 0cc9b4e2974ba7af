"""Publishing a model folder: checked first, then one commit, so that nothing is ever half-published."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors
from safetensors import SafetensorError, safe_open

from ..configuration_apm import APMConfig
from ..runs.run import manifest_faults
from .cards import change_card, warning_of

logger = logging.getLogger("apm_hf")

# Of a training run, what is no part of the model, or shows images that may not be ours to publish.
NOT_PUBLISHED = [
    "checkpoints/*",
    "logs/*",
    "distillation/*",
    "pictures/*",
    "*.partial*",
    ".*",
    "previous/*",
    "manifest.json",
    "**/.*",
    "__pycache__/*",
]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    force: bool = False,
) -> str:
    """Upload a model folder: weights, configuration, image processor, code and card.

    The card in the folder, unless it was edited, is given the repository's name. Checkpoints, logs and
    pictures of validation images stay at home.

    Args:
        folder: of a saved model.
        repo_id: `user/name`, made where it does not exist; `name` alone is the user's own.
        private: of a repository that is made.
        token: by default the one of `hf auth login` or of `HF_TOKEN`.
        revision: branch, made where it does not exist.
        create_pr: propose the commit to a repository that exists instead of making it.
        commit_message: first line of the commit.
        force: publish a model too whose card warns of it.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: for a folder that holds no whole model, or pickles, or a model that its card warns of; before the
            Hub is reached.
        PermissionError: the token is missing, wrong, or may not write there.
        FileNotFoundError: a pull request to a repository that does not exist.
        ConnectionError: no network, offline mode, or a connection that broke.
        huggingface_hub.errors.HfHubHTTPError: anything else that the Hub says.
    """
    folder = Path(folder)
    check_folder(folder)
    if (warning := warning_of(folder)) and not force:
        raise ValueError(f"{folder}: expected a model without a warning in its card, or --force: {warning}")
    api = HfApi(token=token)
    with _explained(repo_id):
        if create_pr:
            api.repo_info(repo_id)
        else:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not change_card(folder, repo_id=repo_id):
            logger.info(f"{folder.name}/README.md: no card of this package's making, published as it is")
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message=commit_message or "Upload APM",
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=NOT_PUBLISHED,
        )
    return commit.pr_url or commit.commit_url


def check_folder(folder: Path) -> None:
    """Raise a `ValueError` for what is no whole model that `from_pretrained` would load."""
    if not (folder / "config.json").exists():
        raise ValueError(f"folder: expected a saved model with a config.json, got {os.fspath(folder)!r}")
    try:
        config = APMConfig.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"folder: expected weights in model.safetensors, found none in {os.fspath(folder)!r}")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a whole safetensors file, got: {error}") from error
    sees_pixels = config.folds_pixels or config.local_patch
    if sees_pixels and not (folder / "preprocessor_config.json").exists():
        raise ValueError(
            f"folder: expected an image processor beside the model, found no preprocessor_config.json in "
            f"{os.fspath(folder)!r}; APMImageProcessor(...).save_pretrained(folder) writes it"
        )
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise ValueError(f"folder: expected weights in safetensors only, got {', '.join(pickles)}")
    for fault in manifest_faults(folder):
        logger.warning(f"{fault}; it is damaged, or was changed since the run that made it")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Say in one line what is wrong and what helps; the Hub's own message follows as the cause."""
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError("the Hub cannot be reached: HF_HUB_OFFLINE is set") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo_id}: gated; ask for access on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        if getattr(error.response, "status_code", None) == 401:
            raise PermissionError(f"{repo_id}: {_TOKEN}") from error
        raise FileNotFoundError(f"{repo_id}: no such repository, or a private one the token does not open") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise PermissionError(f"{repo_id}: {_TOKEN}") from error
        if status == 403:
            raise PermissionError(f"{repo_id}: the token may not write there: {error.server_message}") from error
        raise
    except RuntimeError as error:  # of files that travel before the commit
        raise ConnectionError(f"{repo_id}: nothing was published. {error} {error.__cause__ or ''}".strip()) from error
    except errors.HTTPError as error:
        raise ConnectionError(f"{HfApi().endpoint} cannot be reached: {error}") from error


_TOKEN = "the Hub knows no such token, or got none; log in with `hf auth login` or set HF_TOKEN"
