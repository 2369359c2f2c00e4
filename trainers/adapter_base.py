"""Which weights adapters were trained on: a note beside them, that they are merged into no others.

Knows nothing about training; weights are known by the SHA-256 in a folder's manifest.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel

from segcompass.modeling_segcompass.manifest import noted_files
from segcompass.modeling_segcompass.whole_files import read_signed_json, signed_json, write_whole

BASE = "base_model.json"


def base_of(model: Any) -> dict[str, Any] | None:
    """Which weights the adapters of a model belong to.

    Args:
        model: what is trained.

    Returns:
        {"model": its name, "weights": see `weights_of`}; None without adapters, or where nobody can tell.
    """
    if not isinstance(model, PeftModel):
        return None
    name = next(iter(model.peft_config.values())).base_model_name_or_path
    weights = weights_of(name) if name else None
    return {"model": name, "weights": weights} if weights else None


def note_base(base: dict[str, Any], folder: str | Path) -> None:
    """Write what `base_of` returned beside adapters.

    Args:
        base: not None.
        folder: where the adapters are saved.
    """
    write_whole(Path(folder) / BASE, signed_json(base) + "\n")


def trained_on(adapters: Path) -> tuple[str, dict[str, str] | None]:
    """What adapters were trained on.

    Args:
        adapters: their folder, which holds adapter_config.json.

    Returns:
        The model's name, "" where none is noted; and its weights as `weights_of` has them, None where nobody knows.

    Raises:
        ValueError: a file is damaged; it is named.
    """
    if (adapters / BASE).is_file():
        noted = read_signed_json(adapters / BASE)
        if set(noted) != {"model", "weights"}:
            raise ValueError(f"{adapters / BASE} has {sorted(noted)}, not model and weights; fetch the folder again.")
        return noted["model"], noted["weights"]
    name = read_signed_json(adapters / "adapter_config.json").get("base_model_name_or_path") or ""
    return name, weights_of(name) if name else None


def weights_of(folder: str | Path) -> dict[str, str] | None:
    """SHA-256 of a signed folder's weights by file; None where there is no such folder."""
    noted = noted_files(folder)
    return {name: file["sha256"] for name, file in noted.items() if name.endswith(".safetensors")} or None
