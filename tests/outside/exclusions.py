"""What of transformers' common tests is not run on SegCompass, or not as it stands, and why.

docs/outside_suites.md shows these tables; `test_exclusions.py` holds the page and the tables equal.
"""

from fnmatch import fnmatch

EXCLUDED = {
    ("models", "test_model_base_model_prefix"): (
        "A SegCompass model is no base model under a head: MLLM, image encoder, SAE and segmentation modules stand "
        "side by side, so it is its own base model."
    ),
    ("models", "test_model_weights_reload_no_missing_tied_weights"): (
        "It loads a file that holds none of the weights and reads the report. Here missing weights are an error: "
        "`tests/modeling_segcompass/test_loading.py`."
    ),
    ("models", "test_can_init_all_missing_weights"): (
        "It loads no weights at all and lets them be made anew. Here missing weights are an error."
    ),
    ("models", "test_reverse_loading_mapping"): (
        "It asks for the names that the MLLM's own checkpoints have. A SegCompass folder has one set of names, which "
        "the code that lies beside the weights reads; `save_original_format=True` is refused."
    ),
    ("models", "test_get_*_features_*"): (
        "A SegCompass model has no such methods, and the tests would look at nothing; they are the MLLM's "
        "(`model.mllm.get_image_features`). Its own is `get_image_embeddings`."
    ),
    ("processors", "test_apply_chat_template_image_*"): (
        "It begins with conversations without an image. There is nothing to segment in them, and the processor "
        "refuses them. Conversations with an image: `test_chat_template_tokenises_the_same_prompt`."
    ),
    ("processors", "test_apply_chat_template_assistant_mask"): (
        "Its conversations have several images, or none. A SegCompass prompt has one."
    ),
    ("processors", "test_processor_text_has_no_visual"): (
        "One of its samples has no image. There is nothing to segment in it, and the processor refuses it."
    ),
    ("processors", "test_if_input_has_mismatching_tokens_and_mm_data"): (
        "It asks for the words of transformers' own error. Unequal numbers of images and texts are refused in others: "
        "`test_as_many_instructions_as_images_are_needed`."
    ),
}
"""{(suite, tests): why they do not apply}. A star stands for anything."""

LANGUAGE_ALONE = {
    "test_inputs_embeds": "It passes embeddings instead of token ids, and masks need to know the tokens.",
    "test_model_outputs_equivalence": (
        "It subtracts one output from the other, which torch refuses for tensors of true and false. All outputs: "
        "`tests/modeling_segcompass/test_forward_conventions.py`."
    ),
}
"""{test: why it is run without the inputs that masks are made from}."""

SKIPPED = {
    "test requires *": "the machine lacks a device, or the environment a package",
    "test is slow": "needs pretrained weights; `RUN_SLOW=1` asks for them",
    "*audio_processor attribute not present*": "no sound",
    "*feature_extractor attribute not present*": "no sound",
    "*video_processor attribute not present*": "no videos",
    "Processor doesn't accept videos at input": "no videos",
    "Chat template does not support tools": "the tiny chat template has none",
    "Processor doesn't support `_get_num_multimodal_tokens` yet": "vLLM serves the MLLM with the MLLM's own processor",
    "This model has no `base_model_class` *": "tests of language models alone; the MLLM's own suite has them",
    "No decoder-only language modeling head to check": "by the name of the class; the loss is the MLLM's",
    "No sequence-to-sequence language modeling head to check": "no encoder and decoder",
    "Not a prioritized model for now.": "see the first table",
    "Model does not have a TP plan.": "no tensor parallelism",
    "This model has no sparse experts.": "no experts",
    "SegCompassModel does not support grouped_mm": "no experts",
    "This model has no `output_router_logits` in its config.": "no experts",
    "Model does not have position embeddings": "of learned length",
    "Model does not support sliding window mask": "the tiny MLLMs have none",
    "* no _keep_in_fp32_modules *": "none is kept",
    "SegCompassModel does not support SDPA": "a test of models without parts; composites have one of their own",
    "Model does not have both a non-text modality tower and a language sub-model*": (
        "it looks for them on the model itself; here they are the MLLM's parts. Choosing an attention for all parts: "
        "`test_attn_implementation_composite_models`"
    ),
}
"""{reason that the suite gives for a skip of its own: what it means here}. Another reason is an error."""

SLOW = (
    "test_bc_torch_dtype",
    "test_eager_matches_sdpa_inference_*",
    "test_training_gradient_checkpointing*",
    "test_can_use_safetensors",
    "test_load_save_without_tied_weights",
    "test_attn_implementation_composite_models",
    "test_sdpa_can_dispatch_composite_models",
    "test_can_load_from_already_mapped_keys",
    "test_load_contiguous_weights",
    "test_resize_tokens_embeddings",
)
"""Tests that run only when everything is asked for."""


def excluded(suite: str, test: str) -> str | None:
    """Why a test of a suite ("models", "processors") is not run; None if it is."""
    return next((why for (where, what), why in EXCLUDED.items() if where == suite and fnmatch(test, what)), None)


def matches(text: str, patterns) -> bool:
    """Whether a text fits one of the patterns."""
    return any(fnmatch(text, pattern) for pattern in patterns)


def tables() -> str:
    """The tables of docs/outside_suites.md."""
    rows = ["| suite | test | why it does not apply |", "|---|---|---|"]
    rows += [f"| {suite} | `{test}` | {why} |" for (suite, test), why in EXCLUDED.items()]
    rows += ["", "| test | why it is run on the language part alone |", "|---|---|"]
    rows += [f"| `{test}` | {why} |" for test, why in LANGUAGE_ALONE.items()]
    rows += ["", "| what the suite says | what it means here |", "|---|---|"]
    rows += [f"| {said} | {meaning} |" for said, meaning in SKIPPED.items()]
    return "\n".join(rows)
