"""The tokens of a response, `<think>…</think><REF_POS>…<REF_POS>`, on any tokenizer: added, checked, and given rows.

Knows tokenizers and embedding rows; what the tokens mean is the business of processor and model.
"""

from collections.abc import Sequence
from string import Formatter
from typing import Any

import torch
from torch import nn
from transformers import AddedToken

REF_TOKEN, THINK, THINK_END = "<REF_POS>", "<think>", "</think>"
PROBE = "it is the mug. No, B4 the cup"
"""Reasoning that a tokenizer is tried on: its last letter touches `</think>`."""


def add_response_tokens(tokenizer: Any) -> list[str]:
    """Add the three tokens where they are absent, as ordinary ones that a normalizer leaves alone.

    A plain string would be normalized first: Llama's normalizer puts "▁" before the text, and the token is then found
    after a space only. They are not special, because TRL strips special tokens before a reward reads the response.

    Args:
        tokenizer: the MLLM's; changed in place.

    Returns:
        list: the tokens that were absent, in the order of their new ids.
    """
    absent = [token for token in (THINK, THINK_END, REF_TOKEN) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in absent])
    return absent


def check_response_tokens(tokenizer: Any, response: str, num_slots: int) -> None:
    """Refuse a tokenizer that does not find the tokens of a well-formed response, or does not give them back.

    Args:
        tokenizer: with the three tokens.
        response: a well-formed response.
        num_slots: K_s.

    Raises:
        ValueError: it finds another number of `</think>` or `<REF_POS>`, or decoding loses them.
    """
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    found = {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in (THINK, THINK_END, REF_TOKEN)}
    needed = {THINK: 1, THINK_END: 1, REF_TOKEN: num_slots}
    if found != needed:
        raise ValueError(
            f"this tokenizer finds {found} in a well-formed response, it must find {needed}: masks would be trained on "
            "nothing. The tokens were added as normalized ones; take the MLLM's own tokenizer (without them), and "
            "SegCompassProcessor adds them right."
        )
    text = tokenizer.decode(ids, skip_special_tokens=True)
    end = f"{THINK_END}{REF_TOKEN * num_slots}"
    if not (text.startswith(THINK) and text.endswith(end)):
        raise ValueError(
            f"this tokenizer decodes a well-formed response as {text!r}, but it must begin with {THINK!r} and end with "
            f"{end!r}: no response would earn the format reward. Add the three tokens as ordinary ones "
            "(special=False), as SegCompassProcessor does on the MLLM's own tokenizer."
        )


def check_prompt_template(template: str) -> None:
    """Refuse a template that holds more than `{instruction}` and `{num_slots}`, or less than `{instruction}`.

    Args:
        template: as `str.format` reads it; a brace that is meant as such is doubled.

    Raises:
        ValueError: naming the field.
    """
    if REF_TOKEN in template:
        raise ValueError(
            f"prompt_template contains {REF_TOKEN!r}; describe the token in words, only a response may contain it."
        )
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"prompt_template is {template!r}: {error}; write a brace as {{{{ or }}}}.") from error
    for name, form, conversion in fields:
        if name not in ("instruction", "num_slots") or form or conversion:
            raise ValueError(
                f"prompt_template holds the field {name!r}{f' with format {form!r}' if form else ''}; it may hold "
                "{instruction} and {num_slots} only. Write a brace that is meant as such as {{ or }}."
            )
    if "instruction" not in [name for name, _, _ in fields]:
        raise ValueError(
            f"prompt_template is {template!r}; it must hold {{instruction}}, or nobody's question is asked."
        )


def reserved_in(tokenizer: Any, text: str, image_token: str) -> str | None:
    """The first token with a meaning of its own that the text would be read as, such as `</s>` or `<|im_end|>`.

    Args:
        tokenizer: the MLLM's.
        text: what somebody typed.
        image_token: the MLLM's.

    Returns:
        The token, or None.
    """
    control = {*tokenizer.all_special_tokens, THINK, THINK_END, REF_TOKEN, image_token}
    control |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return next((token for token in sorted(control, key=len, reverse=True) if token and token in text), None)


@torch.no_grad()
def give_rows(mllm: Any, tokenizer: Any, new_tokens: Sequence[str]) -> None:
    """Give tokens that the MLLM has never seen the mean of the others' rows, in its embeddings and its LM head.

    A vocabulary padded to a round number has rows for them already, which no training has touched; they would stay
    as they are. A token counts as unseen if it was added to the tokenizer just now, or if its row is all zeros or
    equals that of the padding.

    Args:
        mllm: changed in place; it grows where it has too few rows.
        tokenizer: with the three tokens.
        new_tokens: those that were added just now.
    """
    known = len(tokenizer)
    if known > mllm.get_input_embeddings().num_embeddings:
        mllm.resize_token_embeddings(known, mean_resizing=True)
    ours = tokenizer.convert_tokens_to_ids([THINK, THINK_END, REF_TOKEN])
    added = set(tokenizer.convert_tokens_to_ids(list(new_tokens)))
    embeddings, head = mllm.get_input_embeddings(), mllm.get_output_embeddings()
    unseen = [token for token in ours if token in added or _is_untouched(embeddings.weight, token, known)]
    if not unseen:
        return
    others = [token for token in range(known) if token not in unseen]
    modules: list[nn.Module] = [embeddings]
    if head is not None and head.weight is not embeddings.weight:
        modules.append(head)
    for module in modules:
        weight: Any = module.weight
        weight[unseen] = weight[others].float().mean(0).to(weight.dtype)
        if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
            bias[unseen] = bias[others].float().mean().to(bias.dtype)


def _is_untouched(weight, token, known):
    """Whether a row is zeros or equals the first padding row."""
    padding = weight[known] if len(weight) > known else None
    return bool((weight[token] == 0).all()) or (padding is not None and torch.equal(weight[token], padding))
