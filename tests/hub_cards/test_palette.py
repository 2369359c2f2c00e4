"""The Space's own copy of the palette: its repository holds nothing of this project."""

import ast

from segcompass.modeling_segcompass.palette import SLOT_COLOURS
from tests.support.hub_client import ROOT


def test_the_space_has_the_colours_of_the_palette():
    tree = ast.parse((ROOT / "hub_cards" / "space" / "why_page.py").read_text())
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLOURS"
    )
    assert ast.literal_eval(value) == SLOT_COLOURS
