"""What is known of the small model that ships, and of no other: its words and its board.

A model of few parameters is taken for it. Its tokenizer was made from the words that it was taught, each whole, so a
word that falls into pieces is one it never learned. Knows nothing about the page.
"""

from typing import Any

SMALL = 20_000_000
"""Parameters up to which a model is taken for the one that ships."""
KNOWS = (
    "The small model that runs here ({millions:.1f} million parameters) has only ever seen drawn scenes like the "
    "examples; photographs mean nothing to it. It calls places by a board: columns A to D from left to right, rows 1 "
    "to 4 from top to bottom; “B3” is a place."
)
BOARD = {**{letter: f"column {letter}" for letter in "ABCD"}, **{digit: f"row {digit}" for digit in "1234"}}
"""How the places of its board are called in full: its cells are squares, four along the longest side."""


def millions(model: Any) -> float:
    """Parameters of a model, in millions."""
    return sum(weight.numel() for weight in model.parameters()) / 1e6


def is_small(model: Any) -> bool:
    """Whether a model is taken for the one that ships."""
    return 1e6 * millions(model) <= SMALL


def unknown_words(tokenizer: Any, instruction: str) -> list[str]:
    """The words of an instruction that are none of those that the small model was taught.

    Args:
        tokenizer: the small model's.
        instruction: what a visitor asked for.

    Returns:
        Each once, in order. The first word counts as it stands there: “stars” at the very beginning is none, though it
        was taught inside of questions. [] with a tokenizer that does not cut a text into words, which is another's.
    """
    words = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if words is None:
        return []
    text = instruction.encode("utf-8", "ignore").decode("utf-8").strip()  # half characters are refused elsewhere
    found = []
    for _, (start, end) in words.pre_tokenize_str(text):
        word = text[start:end]
        if any(map(str.isalpha, word)) and len(tokenizer.tokenize(word)) > 1:
            found.append(word.strip())
    return list(dict.fromkeys(found))


def warning(unknown: list[str]) -> str:
    """What is said of an answer to words that the model never learned; "" where it knows them all."""
    if not unknown:
        return ""
    named = " and ".join(filter(None, [", ".join(f"“{word}”" for word in unknown[:-1]), f"“{unknown[-1]}”"]))
    return f"It never learned {named} (as written), so its answer is a guess. Ask as the examples do."
