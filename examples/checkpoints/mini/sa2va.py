"""The face of the Sa2VA family of models, for programs written for it."""

from typing import Any


def predict_forward(
    model: Any,
    image: Any = None,
    text: Any = None,
    processor: Any = None,
    tokenizer: Any = None,
    past_text: str = "",
    mask_prompts: Any = None,
    video: Any = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Answer as Sa2VA models do; also a method of SegCompassModel.

    Args:
        model: a SegCompassModel.
        image: one image.
        text: the instruction, with or without a leading "<image>".
        processor: the model's SegCompassProcessor.
        tokenizer: another name for `processor`.
        past_text: must stay empty; the model reads one instruction.
        mask_prompts: must stay empty.
        video: must stay empty; the model reads one image.
        threshold: confidence from which a slot is kept, in [0, 1].

    Returns:
        dict: "prediction", the response, ending in one "[SEG]" per mask, and "prediction_masks", a list of bool
        arrays (1, H, W), one per instance. The list is empty when nothing is found.

    Raises:
        ValueError: no processor or another model's, a conversation, mask prompts or a video.
    """
    for name, value in (("past_text", past_text), ("mask_prompts", mask_prompts), ("video", video)):
        if value:
            raise ValueError(f"{name} is not supported: this model reads one image and one instruction.")
    processor = processor if processor is not None else tokenizer
    if not hasattr(processor, "post_process_instance_segmentation"):
        raise ValueError(
            f"processor is {type(processor).__name__}; pass AutoProcessor.from_pretrained(<this model>, "
            "trust_remote_code=True)."
        )
    processor.check_fits(model.config)
    text = text.removeprefix("<image>") if isinstance(text, str) else text
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)
    outputs = model.segment(**inputs)
    result = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=inputs["original_sizes"])
    masks = [mask[None].cpu().numpy() for mask in result[0]["masks"]]  # each (1, H, W)
    response = outputs.sequences[0, outputs.prompt_length :]
    response = response[response != model.config.ref_token_id]
    answer = processor.decode(response, skip_special_tokens=True).strip()
    return {"prediction": answer + "[SEG]" * len(masks), "prediction_masks": masks}
