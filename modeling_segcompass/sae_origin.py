"""Which MLLM a sparse autoencoder was trained on, and whether that is the one it is put into.

The commit on the Hub decides where both are known: a folder's name says nothing about what is in it.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Where an MLLM came from.

    Example:
        >>> str(Origin("llava-hf/llava-1.5-7b-hf", "8c85e9a4"))
        "'llava-hf/llava-1.5-7b-hf' at 8c85e9a"
    """

    name: str | None
    """Hub id or folder, None when unknown."""
    revision: str | None
    """commit on the Hub, None when unknown."""

    def __str__(self) -> str:
        return f"{self.name!r}" + (f" at {self.revision[:7]}" if self.revision else "")

    def same(self, other: "Origin") -> bool:
        """Whether both are one MLLM: one commit, or one name. Of two commits of one name the later may differ little,
        which a warning says."""
        if self.revision and self.revision == other.revision:
            return True
        if self.name is None or other.name is None or _full(self.name) != _full(other.name):
            return False
        if self.revision and other.revision:
            logger.warning("the SAE's backbone is %s, the MLLM is %s; its hidden states may differ.", self, other)
        return True


def origin_of(mllm_config: PreTrainedConfig) -> Origin:
    """Where a loaded MLLM came from, as its configuration and the folder that it was read from say.

    Args:
        mllm_config: the MLLM's configuration.

    Returns:
        Its origin. The commit is known of what was read from the Hub, from the Hub's cache by path, or from a folder
        that the Hub's client downloaded to.
    """
    name = mllm_config._name_or_path or None
    revision = getattr(mllm_config, "_commit_hash", None)
    if name is None or not os.path.isdir(name):
        return Origin(name, revision)
    parts = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})", os.path.abspath(name))
    if parts:
        return Origin(parts[1].replace("--", "/"), parts[2])
    try:
        noted = Path(name, ".cache", "huggingface", "download", "config.json.metadata").read_text().split()
    except OSError:
        noted = []
    return Origin(name, revision or (noted[0] if noted else None))


def check_origin(sae_config: Any, *backbones: Origin) -> None:
    """Refuse an SAE of another MLLM.

    Args:
        sae_config: the SAE's configuration; one without a `backbone` fits any.
        *backbones: what the MLLM is known as; nothing is checked where all are unknown.

    Raises:
        ValueError: the SAE was trained on none of them.
    """
    trained_on = Origin(sae_config.backbone, sae_config.backbone_revision)
    known = [backbone for backbone in backbones if backbone.name]
    if trained_on.name and known and not any(trained_on.same(backbone) for backbone in known):
        raise ValueError(
            f"the SAE was trained on {trained_on}, but the MLLM is {' or '.join(dict.fromkeys(map(str, known)))}; load "
            "an SAE of this backbone, or set sae.config.backbone=None (in its config.json: null) to overrule."
        )


def _full(name):
    return os.path.realpath(name) if os.path.isdir(name) else name
