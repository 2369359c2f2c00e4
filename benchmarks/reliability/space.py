"""The Space's logic without its page, for the harnesses that ask it questions.

Plain objects stand for gradio where it is not installed. The logic lies in `asking.py` and `visitors.py` of
`hub_cards/space`, or, in a Space of one file, in `app.py`.
"""

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "hub_cards" / "space"


def space() -> SimpleNamespace:
    """Demo (the class), check_threshold, and Error (what a visitor is refused with)."""
    if importlib.util.find_spec("gradio") is None and "gradio" not in sys.modules:
        gradio = ModuleType("gradio")
        refused = type("Error", (Exception,), {})
        gradio.__dict__.update(skip=lambda: None, Radio=dict, Slider=dict, Error=refused, Blocks=object, Request=object)
        sys.modules["gradio"] = gradio
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if (FOLDER / "asking.py").exists():
        asking, visitors = (importlib.import_module(name) for name in ("asking", "visitors"))
    else:
        spec = importlib.util.spec_from_file_location("space_app", FOLDER / "app.py")
        assert spec is not None and spec.loader is not None
        asking = visitors = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(asking)
    return SimpleNamespace(Demo=asking.Demo, check_threshold=visitors.check_threshold, Error=asking.gr.Error, of=asking)


def demo_of(parts: SimpleNamespace, model: Any, processor: Any) -> Any:
    """A demo of a loaded model, with nobody there.

    Args:
        parts: what `space` returned.
        model: the model.
        processor: its processor.

    Returns:
        The demo; `demo.passes` is an empty Counter, `demo.refusals` the error's class.
    """
    demo = parts.Demo.__new__(parts.Demo)
    if hasattr(demo, "set_up"):
        demo.set_up(model, processor)
    else:
        demo.model, demo.processor = model, processor
        demo.line, demo.answers, demo._asking = parts.of.Line(), parts.of.Answers(), {}
    demo.passes, demo.refusals = Counter(), parts.Error
    return demo


def told(shown: Any) -> tuple[str, str, Any]:
    """What a finished answer says: (its text, its verdict, its masks or picture)."""
    if hasattr(shown, "why"):
        return shown.text, shown.why.verdict, shown.answer.outputs.pred_masks.numpy()
    return shown[0], shown[2], shown[1]


def name_of(shown: Any) -> str:
    """The name by which a page asks for changes of an answer."""
    return shown.question if hasattr(shown, "question") else shown[4]
