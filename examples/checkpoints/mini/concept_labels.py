"""Names of concepts: the labels that the concept dictionary beside a model gives, and which concepts a name means.

Reads only the labels; the dictionary itself is made and read by `segcompass.white_box.concept_dictionary`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

from transformers.utils import cached_file

from .whole_files import read_signed_json

DICTIONARY = "concepts.json"


def read_labels(source: str | Path, d_sae: int, revision: str | None = None) -> dict[int, str]:
    """The labels in the `concepts.json` of a folder or a Hub repository.

    Args:
        source: folder or Hub id of the model.
        d_sae: the number of the SAE's features.
        revision: of the Hub repository.

    Returns:
        {feature index: label}, {} when there is no such file.

    Raises:
        ValueError: the file is damaged, or of an SAE with another number of features.
    """
    path = cached_file(
        str(source),
        DICTIONARY,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return {}
    try:
        content = read_signed_json(path)
        features = content["features"]
        labels = {int(entry["index"]): entry["label"] for entry in content["concepts"] if entry["label"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no concept dictionary ({error!r}); build it again.") from error
    if features != d_sae:
        raise ValueError(
            f"{path} describes {features} features, this model's SAE has {d_sae}; build the dictionary again from this "
            "model."
        )
    return labels


def concepts_named(concept: int | str, labels: Mapping[int, str] | None, d_sae: int) -> list[int]:
    """The features that an index or a label means; several features may have one label.

    Args:
        concept: index, or label in any case.
        labels: {feature index: label}; None or {} when there is no dictionary.
        d_sae: the number of the SAE's features.

    Returns:
        Indices, at least one.

    Raises:
        ValueError: an index out of range, or a label that no concept has.
    """
    if not isinstance(concept, str):
        if not 0 <= concept < d_sae:
            raise ValueError(f"concept {concept} is out of range; this SAE has concepts 0 to {d_sae - 1}.")
        return [int(concept)]
    if not labels:
        raise ValueError(
            f"concept {concept!r} is a label, but no {DICTIONARY} lies beside this model; name the concept by its "
            "index, write the dictionary into the model's folder (segcompass dictionary), or set model.concept_labels."
        )
    wanted = concept.strip().casefold()
    found = [index for index, label in labels.items() if label.strip().casefold() == wanted]
    if not found:
        known = sorted({label.strip() for label in labels.values()})
        near = difflib.get_close_matches(concept.strip(), known, n=5, cutoff=0.5)
        near = near or [label for label in known if wanted in label.casefold()][:5]
        raise ValueError(
            f"no concept is called {concept!r}; "
            + (f"close labels: {', '.join(map(repr, near))}. " if near else f"the dictionary has {len(known)} labels. ")
            + "Use one of the dictionary's labels, or an index."
        )
    outside = [index for index in found if not 0 <= index < d_sae]
    if outside:
        raise ValueError(f"the label {concept!r} is of concept {outside[0]}, but this SAE has 0 to {d_sae - 1}.")
    return found
