"""The three routes of the paper's Figure 1 from a response to masks, by the names that `--route` takes.

docs/routes.md has the table of what each needs and gives. Knows nothing about how any of them works.
"""

from typing import Any, Literal

Route = Literal["concepts", "tokens", "boxes"]

ROUTES: tuple[Route, ...] = ("concepts", "tokens", "boxes")
"""Figure 1(c), the whole model; 1(a), the concentration tokens' states alone; 1(b), boxes that an MLLM writes."""

QUERY_SOURCES = {"concepts": "both", "tokens": "tokens"}
"""Route of a SegCompass model -> the `query_source` of its `segment`."""

PHOTOGRAPH = "--route boxes --mllm Qwen/Qwen2.5-VL-7B-Instruct --image-encoder facebook/sam-vit-huge"
"""Options for photographs, of which no trained SegCompass model is known here."""


def check_route(model: Any, route: str) -> None:
    """Refuse a route that a loaded model cannot take, before it writes anything.

    Args:
        model: a SegCompassModel.
        route: "concepts" or "tokens".

    Raises:
        ValueError: tokens, of a model that reads none.
    """
    if route == "tokens" and model.grounded:
        raise ValueError(
            "route is 'tokens', but this model has concept_reading='grounded' and reads no concentration token's "
            "state; use --route concepts, or a model with concept_reading='feature' or 'token'."
        )
