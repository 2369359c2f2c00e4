"""A saved folder before it is read: found, on this machine or in the Hub's cache, and checked against its manifest.

What `from_pretrained` and `save_pretrained` of the model, the SAE and the processor share: the refusal of what is not
there, not whole or not finite, and the signature. What a manifest is, is the business of `manifest`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file

from .manifest import MANIFEST, READ_BY_MODELS, check, listed, signing
from .weights import check_finite, check_types, with_files

HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token")
"""Keywords of `from_pretrained` that say how to reach the Hub."""


def check_saved(
    source: str | os.PathLike,
    keywords: dict[str, Any],
    endings: tuple[str, ...] = READ_BY_MODELS,
    anchor: str = CONFIG_NAME,
) -> Path:
    """Find a saved folder and check it, see `manifest.check`.

    Of a Hub id it fetches the configuration, the manifest, and the weights files that will be loaded, so that they are
    checked before they are read. The Hub's cache holds what was asked for, so nothing is missing there.

    Args:
        source: folder or Hub id.
        keywords: those of the `from_pretrained` that asks: `revision`, `subfolder`, `variant`, and how to
            reach the Hub.
        endings: of the names of the files that will be read.
        anchor: a file by which the folder is found in the Hub's cache; a model's folder must hold it.

    Returns:
        The folder.

    Raises:
        ValueError: the folder differs from its manifest, or a weights file's header does not fit it.
        OSError: there is no such folder or repository, or it has no configuration.
    """
    subfolder = keywords.get("subfolder") or ""
    if os.path.isdir(source):
        folder = Path(source, subfolder)
        if ".safetensors" in endings and not (folder / anchor).is_file():
            if (folder / "adapter_config.json").is_file():
                raise OSError(
                    f"{folder} holds adapters and no model; put them into the model that they were trained on "
                    f"(segcompass merge {folder} --model MODEL --output FOLDER), and name the folder of that."
                )
            raise OSError(
                f"{folder} holds no {anchor}, so that nobody knows what it is; name a folder that save_pretrained "
                "wrote, and fetch it again if a download was cut off."
            )
        check(folder, endings)
        return folder
    hub = {name: keywords[name] for name in HUB_KEYWORDS if keywords.get(name) is not None}
    try:
        found = cached_file(source, anchor, revision=keywords.get("revision"), subfolder=subfolder, **hub)
    except (OSError, ValueError) as error:
        if str(source) and str(source) in str(error):
            raise
        raise OSError(f"{str(source)!r} is no folder here, and cannot be had from the Hub: {error}") from error
    assert found is not None  # it raises where there is none
    folder = Path(found).parent
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", str(folder))
    hub["revision"] = commit[1] if commit else keywords.get("revision")
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    cached_file(source, MANIFEST, subfolder=subfolder, **hub, **lenient)
    if ".safetensors" in endings:
        variant = f".{keywords['variant']}" if keywords.get("variant") else ""
        loaded = re.compile(rf"model{re.escape(variant)}(-\d+-of-\d+)?\.safetensors")
        for name in filter(loaded.fullmatch, listed(folder)):
            cached_file(source, name, subfolder=subfolder, **hub, **lenient)
    check(folder, endings, missing=False)
    return folder


@contextmanager
def signing_saved(folder: str | os.PathLike, keywords: dict[str, Any]) -> Iterator[None]:
    """Within it a folder is saved, and signed at its end, see `manifest.signing`.

    Args:
        folder: where the files go.
        keywords: those of the `save_pretrained` that saves; processes that do not write do not sign.

    Yields:
        None.

    Raises:
        ValueError: `push_to_hub` or `save_original_format` is among the keywords.
    """
    if keywords.get("push_to_hub"):
        raise ValueError(
            "push_to_hub=True uploads the folder before it is signed; save it without, and call push_to_hub(repo_id) "
            "or `segcompass push`."
        )
    if keywords.get("save_original_format"):
        raise ValueError(
            "save_original_format=True asks for the names that the parts' own checkpoints have, and the folder of a "
            "SegCompass model or SAE has one set of names; leave it out, or save a part alone: model.mllm."
            "save_pretrained(folder)."
        )
    if not keywords.get("is_main_process", True):
        yield
        return
    with signing(folder):
        yield


def check_given(keywords: dict[str, Any]) -> None:
    """Refuse a `from_pretrained` of no path without what transformers then makes the model of.

    Args:
        keywords: those of the `from_pretrained` that asks.

    Raises:
        ValueError: `config` or `state_dict` is not among them.
    """
    for name in ("config", "state_dict"):
        if keywords.get(name) is None:
            raise ValueError(
                f"the path is None, and so is {name}; pass a folder or a Hub id, or both config= and state_dict=."
            )


def check_loaded(model: Any, info: dict[str, Any], source: Any, unexpected: bool = True) -> None:
    """Refuse a model whose weights were not all in the file, or are not all numbers.

    Args:
        model: the loaded model.
        info: transformers' report on its weights.
        source: folder or Hub id, for the error; None = a state dict that was passed.
        unexpected: whether weights that the model has no place for are a fault; others' checkpoints may hold more.

    Raises:
        ValueError: weights are missing, unexpected, of another shape, whole numbers, or not finite.
    """
    kinds = (
        ("missing_keys", "unexpected_keys", "mismatched_keys") if unexpected else ("missing_keys", "mismatched_keys")
    )
    wrong = {name: sorted(map(str, info[name])) for name in kinds}
    if any(wrong.values()):
        found = "; ".join(f"{name}: {len(keys)} ({', '.join(keys[:3])} ...)" for name, keys in wrong.items() if keys)
        raise ValueError(
            f"{with_files(source or 'state_dict')} does not match this model ({found}); nothing was loaded. Use the "
            "folder that save_pretrained wrote, with its own config.json."
        )
    if source is not None and os.path.isdir(source):
        check_types(model, source)
    check_finite(model, source or "state_dict")


def own_config(source: Any, fields: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The fields of a configuration, unless there are none or they are another model's.

    Args:
        source: folder or Hub id, for the error.
        fields: what its config.json holds.
        model_type: what it must be.

    Returns:
        The fields.

    Raises:
        OSError: there is no configuration.
        ValueError: it is another model's.
    """
    if not fields:
        raise OSError(
            f"{source} holds no {CONFIG_NAME}, so nobody knows what it is; name a folder that save_pretrained wrote."
        )
    if fields.get("model_type", model_type) != model_type:
        raise ValueError(
            f"{source} holds a {fields['model_type']!r} model, where {model_type!r} is needed; name a folder of that "
            "kind (a SegCompass model's SAE is its attribute `sae`)."
        )
    return fields
