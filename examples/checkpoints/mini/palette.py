"""The colours of slots, the same in every overlay, figure and page: slot 0 is red wherever it is drawn."""

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
