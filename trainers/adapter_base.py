"""Which weights adapters were trained on: a note beside them, that they are merged into no others.

Knows nothing about training; weights are known by the SHA-256 in a folder's manifest.
"""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from segcompass.modeling_segcompass.manifest import noted_files
from segcompass.modeling_segcompass.whole_files import write_whole

BASE = "base_model.json"


def note_base(model: Any, folder: str | Path) -> None:
    """Write which weights the adapters of a model belong to, where these lie signed on this machine.

    Args:
        model: what is trained; without adapters nothing is written.
        folder: where the adapters are saved.
    """
    if not isinstance(model, PeftModel):
        return
    name = next(iter(model.peft_config.values())).base_model_name_or_path
    weights = weights_of(name) if name else None
    if weights:
        write_whole(Path(folder) / BASE, json.dumps({"model": name, "weights": weights}, indent=2) + "\n")


def trained_on(adapters: Path) -> tuple[str, dict[str, str] | None]:
    """What adapters were trained on.

    Args:
        adapters: their folder, which holds adapter_config.json.

    Returns:
        The model's name, "" where none is noted; and its weights as `weights_of` has them, None where nobody knows.
    """
    if (adapters / BASE).is_file():
        noted = json.loads((adapters / BASE).read_text(encoding="utf-8"))
        return noted["model"], noted["weights"]
    config = json.loads((adapters / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path") or ""
    return name, weights_of(name) if name else None


def weights_of(folder: str | Path) -> dict[str, str] | None:
    """SHA-256 of a signed folder's weights by file; None where there is no such folder."""
    noted = noted_files(folder)
    return {name: file["sha256"] for name, file in noted.items() if name.endswith(".safetensors")} or None
