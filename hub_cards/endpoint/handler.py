"""For Inference Endpoints, which call this file where it lies beside a model: JSON in; text, masks and concepts out.

    {"inputs": {"image": "<base64>", "instruction": "the mug nearest the sink"}, "parameters": {"threshold": 0.5}}

Questions and answers are those of `segcompass serve`. It takes the model as remote code, so it needs transformers and
not the project that made the model.
"""

from typing import Any

import torch
from transformers import pipeline


class EndpointHandler:
    """Answers requests with the model in its own folder.

    Args:
        path: the folder.

    Example:
        handler = EndpointHandler("/repository")
        answer = handler({"inputs": {"image": text, "instruction": "the mug"}, "parameters": {"threshold": 0.3}})
        masks = [instance["segmentation"] for instance in answer["instances"]]
    """

    def __init__(self, path: str = ".") -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make: Any = pipeline  # the task is the model's own
        self.pipe = make("reasoning-segmentation", model=path, trust_remote_code=True, device=device)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Answer one request.

        Args:
            data: "inputs" with "image" (base64 text) and "instruction"; "parameters" with "threshold", "polygons",
                "concept_scale", "concept_add" and "concept_replace", all of which may be left out.

        Returns:
            "reasoning", "instances" with "score", "box", "segmentation" (COCO RLE), "polygons" and "concepts", and
            more.

        Raises:
            ValueError: the request is refused; the message says what was given, what is needed and what to do.
        """
        return self.pipe.answer_request(data)
