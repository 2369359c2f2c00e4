"""What is known of the small model that ships, and of no other: which it is, its words and its board.

It is known by its weights, wherever they lie; a small model of somebody else's, or this one trained on, is another. Its
tokenizer was made from the words that it was taught, each whole, so a word that falls into pieces is one it never
learned. The page, `segcompass segment` and `segcompass serve` ask here. Knows nothing about the page.
"""

import hashlib
from typing import Any

PARAMETERS = 5_225_102
"""How many the small model has."""
WEIGHTS = "a5903a8431e12a8c827b96dc13a913bb49add260f449ab51d767f1f932e0a595"
"""Its `fingerprint`; another when another model ships."""
PREFIX = 512
"""How many numbers of each parameter are looked at: training changes them all."""
LONGEST_WORD = 30  # letters of a word that are shown
SHAPES = ("ball", "box", "cone", "moon", "ring", "star")
COLOURS = ("blue", "green", "purple", "red", "white", "yellow")
TAUGHT = (
    f"Its words are {', '.join(SHAPES)}; {', '.join(COLOURS)}; small, large; left of, right of, above, below, larger "
    "than."
)
"""Its words for things, in a sentence."""
KNOWS = (
    "The small model that runs here ({millions:.1f} million parameters) has only ever seen drawn scenes like the "
    f"examples; photographs mean nothing to it. {TAUGHT} It calls places by a board: columns A to D from left to "
    "right, rows 1 to 4 from top to bottom; “B3” is a place."
)
BOARD = {**{letter: f"column {letter}" for letter in "ABCD"}, **{digit: f"row {digit}" for digit in "1234"}}
"""How the places of its board are called in full: its cells are squares, four along the longest side."""


def board_names(labels: dict[int, str], is_place: list[bool]) -> dict[str, str]:
    """How concepts are called that are named after the board's words and say where a thing is.

    Args:
        labels: feature -> label.
        is_place: for each feature, whether it tells where a thing is.

    Returns:
        Such as {"C": "column C"}.
    """
    words = {label.removesuffix("(word)").strip() for index, label in labels.items() if is_place[index]}
    return {word: BOARD[word] for word in BOARD if word in words}


def millions(model: Any) -> float:
    """Parameters of a model, in millions."""
    return _count(model) / 1e6


def is_small(model: Any) -> bool:
    """Whether a loaded model is the small one that ships, in half precision or whole."""
    return _count(model) == PARAMETERS and fingerprint(model) == WEIGHTS


def fingerprint(model: Any) -> str:
    """SHA-256 of the beginnings of a model's parameters as 32-bit numbers, in the order of their names."""
    made = hashlib.sha256()
    for _, weight in sorted(model.named_parameters()):
        made.update(weight.detach().flatten()[:PREFIX].float().cpu().numpy())
    return made.hexdigest()


def _count(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


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
    text = instruction.encode("utf-8", "ignore").decode("utf-8")  # half characters are refused elsewhere
    text = " ".join(text.split())  # as the prompt has it
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
    words = [f"“{word}”" if len(word) <= LONGEST_WORD else f"“{word[:LONGEST_WORD]}…”" for word in unknown]
    named = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f"It never learned {named} (as written), so its answer is a guess. {TAUGHT}"
