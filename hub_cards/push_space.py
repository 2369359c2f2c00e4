"""Pushing the Space that shows a model: its folder, with the model's name in the front matter.

Knows nothing about what the Space does; that is `space/app.py`'s.
"""

from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, RepoCard

SPACE = Path(__file__).resolve().parent / "space"
PLACEHOLDER = "USER/segcompass-mini"


def space_card(model: str) -> RepoCard:
    """The README of a Space that shows this model.

    Args:
        model: Hub id.

    Returns:
        The card, with the model in `models` and `preload_from_hub`.

    Raises:
        ValueError: no Hub id.
    """
    if model.count("/") != 1 or not all(model.split("/")):
        raise ValueError(
            f"{model!r} is no Hub id; a Space loads its model from the Hub, so push it and name USER/NAME."
        )
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    return RepoCard(text.replace(PLACEHOLDER, model))


def push_space(
    model: str, repo_id: str, *, branch: str | None = None, private: bool | None = None, token: str | None = None
) -> CommitInfo:
    """Push the Space that shows a model.

    Args:
        model: Hub id of a pushed SegCompass model.
        repo_id: the Space; made if it does not exist.
        branch: where to push; None pushes to main.
        private: whether a new repository is private.
        token: None takes the environment's.

    Returns:
        The commit, or the last one where nothing changed.

    Raises:
        ValueError: the model is no Hub id.
    """
    card, api = space_card(model), HfApi(token=token)
    with TemporaryDirectory() as work:
        folder = copytree(SPACE, Path(work, "space"), ignore=ignore_patterns("__pycache__"))
        card.save(folder / "README.md")
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if branch:
            api.create_branch(repo_id, branch=branch, repo_type="space", exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="space",
            revision=branch,
            commit_message="Push Space",
            delete_patterns=["*.py", "*.png", "*.css", "*.js"],
        )
