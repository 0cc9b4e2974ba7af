"""Publishing: a model folder with a card that says how it was made and what was measured.

The card is `model_card.md`, filled in through `huggingface_hub.ModelCard.from_template`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

# In a wheel the template lies beside this file, in a checkout at the top.
_TEMPLATES = (Path(__file__).with_name("model_card.md"), Path(__file__).parents[2] / "model_card.md")
# Of a training run, what is no part of the model.
_NOT_PUBLISHED = ["checkpoints/*", "logs/*", "distillation/*"]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says.

    Args:
        repo_id: how the model is loaded: `user/name`, or a folder.
        teacher, dataset: names on the Hub, or of local folders, of which only the last part is told.
        command: that made the model.
        steps: optimiser steps.
        num_parameters: of the student.
        metrics: measured figures by name.
    """

    repo_id: str
    teacher: str
    dataset: str
    command: str
    steps: int
    num_parameters: int
    metrics: Mapping[str, float]


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> Path:
    """Write `README.md`, the model card, into a model folder.

    Raises:
        FileNotFoundError: if the package was installed without its template.
    """
    template = next((path for path in _TEMPLATES if path.exists()), None)
    if template is None:
        raise FileNotFoundError(f"model_card.md: expected the card's template in one of {list(map(str, _TEMPLATES))}")
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["apm", "glom", "distillation"],
        datasets=None if _is_local(facts.dataset) else [facts.dataset.split(":")[0]],
        base_model=None if _is_local(facts.teacher) else facts.teacher,
    )
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in facts.metrics.items())
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=Path(facts.repo_id).name,
        repo_id=_public_name(facts.repo_id),
        teacher=_public_name(facts.teacher),
        dataset=_public_name(facts.dataset),
        command=facts.command,
        steps=facts.steps,
        num_parameters=f"{facts.num_parameters:,}",
        metrics=f"| | |\n| --- | --- |\n{rows}" if rows else "Nothing was measured.",
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def publish(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a model folder in one commit, so that nothing is ever half-published. Returns the address of the commit.

    Raises:
        ValueError: for a folder that holds no model.
        huggingface_hub.errors.HfHubHTTPError: what the Hub says of a missing repository or a wrong token.
    """
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"folder: expected a saved model with a config.json, got {os.fspath(folder)!r}")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        folder_path=os.fspath(folder), repo_id=repo_id, commit_message="Upload APM", ignore_patterns=_NOT_PUBLISHED
    )
    return commit.commit_url


def _is_local(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", os.sep)) or not name


def _public_name(name: str) -> str:
    return Path(name).name if _is_local(name) else name
