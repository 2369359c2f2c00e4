"""Which options of transformers' `generate` the masks can follow; the others are refused by name before anything runs.

Masks are decoded from the states of the very passes that wrote a response, so these must be passes over one sequence
per prompt, each token read once. An option counts wherever it was set: as a keyword, in a `generation_config` argument,
or in the model's own. docs/generation.md lists them for users.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

OUR_INPUTS = (
    "encoder_pixel_values",
    "image_embeddings",
    "original_sizes",
    "reshaped_input_sizes",
    "patch_boxes",
    "labels",
    "response_mask",
)
"""What the processor makes for masks and losses; the MLLM's `generate` does not take it."""

NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "num_return_sequences": (1, None),
    "assistant_model": (None,),
    "assistant_early_exit": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "custom_generate": (None,),
    "past_key_values": (None,),
    "inputs_embeds": (None,),
}
"""Options under which other passes run than those over the sequences returned, and the values that change nothing."""


def option(name: str, keywords: Mapping[str, Any], mllm: Any) -> Any:
    """The value that `generate` will use: the keyword's, else the `generation_config` argument's, else the model's.

    Args:
        name: of the option.
        keywords: of the call to `generate`.
        mllm: whose `generate` it is.

    Returns:
        The value; None if it is set nowhere.
    """
    if name in keywords:
        return keywords[name]
    value = getattr(keywords.get("generation_config"), name, None)
    return getattr(mllm.generation_config, name, None) if value is None else value


def refuse_not_followed(options: Mapping[str, Any]) -> None:
    """Refuse options that masks cannot follow, whatever else there is.

    Args:
        options: values by name.

    Raises:
        ValueError: an option of NOT_FOLLOWED that is switched on.
    """
    for name, harmless in NOT_FOLLOWED.items():
        value = options.get(name)
        if value is not None and not any(value == one for one in harmless):
            shown = value if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
            raise ValueError(
                f"{name} is {shown}; masks are read from the passes over one sequence per prompt, each token once, "
                f"and cannot follow it: use {name}={harmless[0]} (keyword, generation_config and the model's own "
                "generation_config count alike)."
            )


def check_generation(keywords: Mapping[str, Any], mllm: Any, for_masks: bool) -> None:
    """Refuse what cannot be right before anything is generated.

    Args:
        keywords: of the call to `generate`.
        mllm: whose `generate` it is.
        for_masks: whether masks are to be decoded from the states of this generation.

    Raises:
        ValueError: an option that masks cannot follow; prompts padded on the right; gradient checkpointing in train
            mode, which takes away the key-value cache.
    """
    without_cache = option("use_cache", keywords, mllm) is False
    if not without_cache and any(getattr(m, "gradient_checkpointing", False) and m.training for m in mllm.modules()):
        raise ValueError(
            "the model is in train mode with gradient checkpointing, under which transformers drops the key-value "
            "cache and generates nonsense; call model.eval() first, or pass use_cache=False."
        )
    mask = keywords.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"sample {row} ends in padding, so generation would go on after it; pad prompts on the left, as the "
            "processor does without response=."
        )
    if not for_masks:
        return
    refuse_not_followed({name: option(name, keywords, mllm) for name in NOT_FOLLOWED})
    if option("cache_implementation", keywords, mllm) == "paged":
        raise ValueError(
            "cache_implementation is paged, which batches tokens across requests; masks cannot follow it: use "
            "dynamic (the default) or static."
        )
    if keywords.get("input_ids") is None:
        raise ValueError("input_ids is None; masks need to know the tokens: pass the processor's input_ids.")


_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()  # type: ignore[valid-type]
_MAKING_LOCKS = threading.Lock()


@contextmanager
def one_generation_at_a_time(mllm: nn.Module) -> Iterator[None]:
    """Wait until no other thread generates with this MLLM: for families that note something on the model meanwhile.

    Args:
        mllm: the model.

    Yields:
        Nothing.
    """
    with _MAKING_LOCKS:
        lock = _LOCKS.setdefault(mllm, threading.RLock())
    with lock:
        yield
