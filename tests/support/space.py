"""The Space's modules, as its own folder has them; plain objects stand for gradio where it is not installed."""

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

from tests.support.hub_client import ROOT

FOLDER = ROOT / "hub_cards" / "space"
MODULES = ("effects", "small_model", "whereabouts", "visitors", "why", "why_page", "asking")


def space_modules():
    """A namespace of the Space's modules but for the page itself; they stay imported."""
    if importlib.util.find_spec("gradio") is None and "gradio" not in sys.modules:
        refused = type("Error", (Exception,), {"__init__": lambda self, said, **shown: Exception.__init__(self, said)})
        sys.modules["gradio"] = ModuleType("gradio")
        sys.modules["gradio"].__dict__.update(Error=refused, Request=object)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@contextmanager
def borrowed_space():
    """As `space_modules`, and away again afterwards."""
    before = set(sys.modules)
    try:
        yield space_modules()
    finally:
        for name in {*MODULES, "gradio"} - before:
            if name in MODULES or not hasattr(sys.modules[name], "Blocks"):
                del sys.modules[name]
        if str(FOLDER) in sys.path:
            sys.path.remove(str(FOLDER))


def demo_of(space, model, processor):
    """A demo of a model that is loaded."""
    demo = space.asking.Demo.__new__(space.asking.Demo)
    demo.set_up(model, processor)
    return demo
