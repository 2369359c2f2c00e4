"""`pipeline("reasoning-segmentation", model=..., trust_remote_code=True)`: images and instructions in, segments out.

Results follow transformers' image-segmentation convention, a list of {"score", "label", "mask"} for each image, with
the text and the concepts beside them. It adds nothing to the model: the processor prepares, `segment` answers.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import Pipeline

from .answering import Limits, answer_questions, read_question
from .explanation import heaviest_concepts


class Segments(list):
    """One answer: a list of segments, most confident first, that also says what an empty list cannot.

    Args:
        segments: dicts of "score", "label", "mask", "box", "slot", "text" and, if asked for, "concepts".
        text: the response, without special tokens.
        no_target: True when the model looked and was confident of nothing; False when there are segments, or when its
            answer was malformed.

    Example:
        answer = pipe(image, "the mug nearest the sink")
        masks = [segment["mask"] for segment in answer]
        print(answer.text, answer.no_target)
    """

    def __init__(self, segments: Iterable[dict[str, Any]], text: str, no_target: bool):
        super().__init__(segments)
        self.text = text
        self.no_target = no_target


class ReasoningSegmentationPipeline(Pipeline):
    """Segments what instructions mean. Built by `transformers.pipeline`; needs the model's SegCompassProcessor.

    Args:
        *args: transformers' `Pipeline`'s.
        **kwargs: transformers' `Pipeline`'s: `model`, `processor`, and what else it knows.

    Raises:
        ValueError: the processor is another model's.

    Example:
        pipe = pipeline("reasoning-segmentation", model=path, trust_remote_code=True)
        answer = pipe(image, "the mug nearest the sink")
        answers = pipe(image, ["the mug", "the sink"], explain=True)
    """

    processor: Any  # always a SegCompassProcessor
    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False  # type: ignore[assignment]
    _pipeline_calls_generate = False  # `segment` decides how to generate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.processor.check_fits(self.model.config)

    def __call__(self, images: Any, instructions: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Ask one or many questions.

        Args:
            images: an image (PIL, path or URL), a list of them, or an iterable (a `datasets` data set, a generator) of
                rows {"image", "instruction"}; then `instructions` stays None and answers are streamed.
            instructions: a string, or a list of as many as images. One image goes with many instructions, one
                instruction with many images.
            **kwargs: `threshold` (0.5), the probability from which a slot is kept;
                `mask_threshold` (0.5), the probability above which a pixel belongs to a mask;
                `explain` (False), True adds to each segment its heaviest concepts;
                `concept_scale` (None), {concept: factor}, see `SegCompassModel.segment`;
                `batch_size` (1), questions answered together;
                all others go to `generate` (`max_new_tokens`, ...).

        Returns:
            one answer for one image and one instruction, a list of answers for lists, a generator of them for an
            iterable. An answer is a list of {"score" float, "label" the instruction, "mask" PIL image of mode "L" with
            255 inside, "box" (left, top, right, bottom), "slot", "text"} with attributes `text` and `no_target`;
            "concepts" is a list of {"index", "weight", "value"}, heaviest first.

        Raises:
            ValueError: no instruction, lists of different lengths, nothing to do, explanations of masks that are made
                without concepts, or what processor and `SegCompassModel.segment` refuse.
        """
        if kwargs.get("num_workers"):
            raise ValueError(f"num_workers is {kwargs['num_workers']}; this pipeline reads in its own process: use 0.")
        batch_size = kwargs.get("batch_size", self._batch_size)
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"batch_size is {batch_size!r}; it counts the questions answered together: use 1 or more.")
        source = kwargs.get("query_source", self._forward_params.get("query_source"))
        if source == "tokens" and kwargs.get("explain", self._postprocess_params.get("explain")):
            raise ValueError(
                "explain is set with query_source='tokens', whose masks are made without concepts; use query_source "
                "'both' or 'concepts', or explain=False."
            )
        if instructions is None:
            return super().__call__(self._stream(images), **kwargs)
        lists = [given for given in (images, instructions) if isinstance(given, (list, tuple))]
        length = max(map(len, lists), default=1)
        images = list(images) if isinstance(images, (list, tuple)) else [images] * length
        instructions = [instructions] * length if isinstance(instructions, str) else list(instructions)
        if not images or len(images) != len(instructions):
            raise ValueError(
                f"{len(images)} images but {len(instructions)} instructions; give one instruction per image, or one of "
                "either to go with all of the other."
            )
        rows = [{"image": image, "instruction": text} for image, text in zip(images, instructions, strict=True)]
        answers = super().__call__(rows, **kwargs)
        return answers if lists else answers[0]

    def answer_request(self, request: Any, limits: Limits | None = None) -> dict[str, Any]:
        """Answer a request that came as JSON, as an endpoint does; the image is bytes or base64, nothing is fetched.

        Args:
            request: see `answering.read_question`.
            limits: see there.

        Returns:
            What can be written as JSON, see `answering.describe_answer`.

        Raises:
            ValueError: the request is refused, see `answering.Refusal`.
        """
        question = read_question(request, self.model, limits)
        (answer,) = answer_questions(self.model, self.processor, [question])
        if isinstance(answer, Exception):
            raise answer
        return answer

    @staticmethod
    def _stream(rows):
        if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
            raise ValueError("no instruction was given; pass pipe(image, 'what to segment') or rows that hold both.")
        for row in rows:
            if not hasattr(row, "keys") or not {"image", "instruction"} <= set(row.keys()):
                raise ValueError(f"a row must hold 'image' and 'instruction', but one is {row!r}.")
            yield row

    def get_iterator(
        self,
        inputs: Iterable[dict],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Segments]:
        """Answers batch by batch: the processor pads as the model needs it, which the base class's collation cannot."""
        rows = iter(inputs)
        while batch := list(islice(rows, batch_size)):
            model_inputs = self.preprocess(batch, **preprocess_params)
            yield from self.postprocess(self.forward(model_inputs, **forward_params), **postprocess_params)

    def _sanitize_parameters(
        self, threshold=None, mask_threshold=None, explain=None, num_workers=None, **segment_parameters
    ):
        given = {"threshold": threshold, "mask_threshold": mask_threshold, "explain": explain}
        return {}, segment_parameters, {name: value for name, value in given.items() if value is not None}

    def preprocess(self, rows: list[dict]) -> dict[str, Any]:  # type: ignore[override]
        """Rows {"image", "instruction"} to the model's inputs."""
        instructions = [row["instruction"] for row in rows]
        inputs = self.processor(images=[row["image"] for row in rows], text=instructions, return_tensors="pt")
        return {"inputs": dict(inputs), "instructions": instructions}

    def _forward(self, model_inputs, **segment_parameters):
        inputs = model_inputs["inputs"]
        outputs = self.model.segment(**inputs, **segment_parameters)
        return {**model_inputs, "sizes": inputs["original_sizes"], "outputs": outputs}

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: dict[str, Any],
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        explain: bool = False,
    ) -> list[Segments]:
        """Outputs of a batch to one answer per row; arguments as for the call."""
        from PIL import Image

        outputs = model_outputs["outputs"]
        results = self.processor.post_process_instance_segmentation(
            outputs, threshold, mask_threshold, target_sizes=model_outputs["sizes"]
        )
        texts = self.processor.batch_decode(outputs.sequences[:, outputs.prompt_length :], skip_special_tokens=True)
        answers = []
        for row, (result, text) in enumerate(zip(results, texts, strict=True)):
            segments = []
            for number in result["scores"].argsort(descending=True).tolist():
                slot = int(result["slots"][number])
                segment = {
                    "score": float(result["scores"][number]),
                    "label": model_outputs["instructions"][row],
                    "mask": Image.fromarray(result["masks"][number].byte().mul(255).cpu().numpy()),
                    "box": tuple(int(edge) for edge in result["boxes"][number]),
                    "slot": slot,
                    "text": text,
                }
                if explain:
                    segment["concepts"] = [
                        {"index": concept.index, "weight": concept.weight, "value": concept.value}
                        for concept in heaviest_concepts(outputs, slot, row)
                    ]
                segments.append(segment)
            no_target = not segments and bool(outputs.slot_mask[row].any())
            answers.append(Segments(segments, text, no_target))
        return answers


CUSTOM_PIPELINES = {
    "reasoning-segmentation": {
        "impl": f"pipeline_segcompass.{ReasoningSegmentationPipeline.__name__}",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
