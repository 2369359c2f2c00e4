"""What is wrong with one row of a batch: raised where its place alone is known, told where its name is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class RowError(ValueError):
    """One row of a batch cannot be used.

    Args:
        row: its place in the batch, from 0.
        problem: what is wrong with it, as a sentence of its own.

    Example:
        with naming_rows(["a.jpg", "b.jpg"]):
            raise RowError(1, "the image is 1 x 900 pixels.")
        # ValueError: sample 'b.jpg': the image is 1 x 900 pixels.
    """

    def __init__(self, row: int, problem: str):
        super().__init__(f"row {row} of the batch: {problem}")
        self.row, self.problem = row, problem


@contextmanager
def naming_rows(names: Sequence[Any]) -> Iterator[None]:
    """While open, a RowError becomes a ValueError that says which sample it is.

    Args:
        names: of the batch's rows.

    Yields:
        Nothing.

    Raises:
        ValueError: for a RowError.
    """
    try:
        yield
    except RowError as error:
        raise ValueError(f"sample {names[error.row]!r}: {error.problem}") from error


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], limit: float, image_token_id: int, sizes: Sequence[tuple[int, int]] | None = None
) -> None:
    """Refuse a prompt that is longer than allowed, and say whether its image is why.

    Args:
        prompts: token ids of each prompt, image tokens included, without padding.
        limit: the processor's `max_prompt_length`.
        image_token_id: the image token.
        sizes: (width, height) of each prompt's image, where known.

    Raises:
        RowError: for the first such prompt.
    """
    for row, ids in enumerate(prompts):
        if len(ids) <= limit:
            continue
        seen = list(ids).count(image_token_id)
        image = "its image" if sizes is None else f"its image of {sizes[row][0]} x {sizes[row][1]} pixels"
        remedy = (
            "let the MLLM see fewer pixels (min_pixels and max_pixels of SegCompassProcessor.from_backbones)"
            if len(ids) - seen < min(seen, limit)
            else "shorten the instruction"
        )
        raise RowError(
            row,
            f"the prompt has {len(ids)} tokens, {seen} of them for {image}; the limit is {limit}: {remedy}, or raise "
            "processor.max_prompt_length.",
        )
