"""The colours of everything that is drawn: of slots, the same in every overlay, figure and page, and of pages.

Slot 0 is red wherever it is drawn. Knows nothing about how pages are built: `report_page` does.
"""

Colour = tuple[int, int, int]
"""(red, green, blue), 0 to 255 each."""

SLOT_COLOURS: tuple[Colour, ...] = (
    (230, 60, 50),  # red
    (50, 120, 230),  # blue
    (60, 180, 75),  # green
    (245, 190, 40),  # yellow
    (160, 80, 200),  # purple
    (40, 190, 200),  # cyan
    (232, 51, 139),  # pink
    (192, 116, 74),  # brown
)

PREDICTED: Colour = (255, 140, 0)
"""A mask that a model made, where it stands beside the true one."""
WANTED: Colour = (0, 200, 255)
"""The true mask."""
IGNORED: Colour = (128, 128, 128)
"""Pixels that do not count."""

PAGE_COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171c"),
    "panel": ("#f5f6f8", "#1d2128"),
    "line": ("#c9ced6", "#3a414c"),
    "soft": ("#5b6472", "#a3acb9"),  # 4.5 to 1 on paper and on panel, both ways
    "ink": ("#1b1f27", "#e8ebf0"),
    "accent": ("#2459b8", "#8ab4ff"),
    "control": ("#8b93a0", "#7d8694"),
}
"""What a page is made of -> (in the light, in the dark), as CSS reads them."""


def slot_colour(slot: int) -> Colour:
    """The colour of a slot; after the last colour they begin again.

    Args:
        slot: k, from 0.

    Returns:
        (red, green, blue).
    """
    return SLOT_COLOURS[slot % len(SLOT_COLOURS)]


def css_colour(colour: Colour) -> str:
    """The colour as CSS and matplotlib read it, "#rrggbb".

    Args:
        colour: (red, green, blue), 0 to 255 each.

    Returns:
        The text.

    Example:
        >>> css_colour(slot_colour(0))
        '#e63c32'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)
