"""The one palette: in every picture a slot has the same colour."""

SLOT_COLOURS = ((230, 60, 50), (50, 120, 230), (60, 180, 75), (245, 190, 40), (160, 80, 200), (40, 190, 200))
"""RGB, 0 to 255, of slot 0, 1, …; later slots start over."""
