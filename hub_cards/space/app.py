"""The Space: ask for something in an image, and see why the mask is where it is and what would move it.

    segcompass demo                                                       # this page, where the project is installed
    SEGCOMPASS_MODEL=ORG/MODEL GRADIO_SERVER_PORT=7861 python app.py      # as a Space runs it

As a Space, with this folder as its repository, the model is the variable SEGCOMPASS_MODEL or the one that README.md
names; elsewhere the small model that ships with the project. It is taken as remote code, so the Space needs
transformers and not this project. This file is the page; `asking.py` has the model, `visitors.py` the line and the
limits, `why.py` the account of an answer and `why_page.py` its HTML. Three functions are also an API and tools for MCP
clients: `segment`, `explain` and `change_concepts`.
"""

import base64
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the files of a Space lie side by side and are no package

import gradio as gr  # noqa: E402
from asking import Demo, Shown, Tools, model_of_the_space  # noqa: E402
from PIL import Image  # noqa: E402
from small_model import KNOWS, millions, warning  # noqa: E402
from visitors import AT_ONCE, MAX_FILE, MAX_TEXT, MAX_WAITING  # noqa: E402
from why_page import answer_page, waiting_page  # noqa: E402

MINI = HERE.parents[1] / "examples" / "checkpoints" / "mini" if len(HERE.parents) > 1 else HERE
ABOUT = (
    "# Why this mask?\nAsk for something in an image. The model writes what it sees; its words fire concepts; each "
    "concept adds heat where it finds itself; the heat becomes the mask. Point at any of them to see what it is linked "
    "with, then change a concept and watch the mask move."
)
EXAMPLES_JS = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-example]');
  if (card) trigger('take', {number: Number(card.dataset.example)});
});
"""
TOLD_JS = """
watch('value', () => {
  const told = element.querySelector('[data-told]'), why = document.querySelector('.why');
  if (told && why) why.dispatchEvent(new CustomEvent('told', {bubbles: true, detail: JSON.parse(told.dataset.told)}));
});
"""
"""Hands `page.js` what is foretold of a concept."""
TELL = "document.querySelector('.why')?.dispatchEvent(new CustomEvent('{}', {{bubbles: true}}))"
BUSY_JS = f"(...given) => {{ {TELL.format('computing')}; return given; }}"
SETTLED_JS = f"() => {{ {TELL.format('settled')}; }}"
"""What tells `page.js` that a change is computed, and that the answer to it is there."""


def examples() -> list[dict]:
    """The scenes that lie beside this file: each has image (a path), instruction and shows."""
    listed = HERE / "examples.json"
    found = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    return [{**each, "image": HERE / each["image"]} for each in found]


def cards(shown: list[dict]) -> str:
    """The examples as buttons."""
    parts = []
    for number, each in enumerate(shown):
        file = io.BytesIO()
        thumb = Image.open(each["image"]).convert("RGB")
        thumb.thumbnail((108, 108))
        thumb.save(file, "jpeg", quality=85)
        picture = base64.b64encode(file.getvalue()).decode("ascii")
        parts.append(
            f"<button type='button' data-example='{number}'><img alt='' src='data:image/jpeg;base64,{picture}'>"
            f"<span>{escape(each['instruction'])}<small>{escape(each['shows'])}</small></span></button>"
        )
    return f"<div class='cards'>{''.join(parts)}</div>"


class Page:
    """What the elements of the page call: the demo's answers as HTML.

    Args:
        demo: the model and its visitors.
    """

    def __init__(self, demo: Demo):
        self.demo, self.examples = demo, examples()

    def html(self, shown: Shown) -> str:
        """What is shown at a moment."""
        if shown.why is None:
            return waiting_page(shown.text, shown.note, warning(shown.unknown))
        answer: Any = shown.answer
        return answer_page(
            shown.why,
            answer.image,
            answer.concepts,
            self.demo.swaps,
            answer.name,
            warning(shown.unknown),
            board=self.demo.small,
            foretells=self.demo.foretells,
        )

    def take(self, event: gr.EventData) -> tuple:
        """The image and the instruction of an example."""
        number: Any = getattr(event, "number", None)
        known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.examples)
        if not known:
            raise gr.Error("There is no such example.")
        return Image.open(self.examples[number]["image"]).convert("RGB"), self.examples[number]["instruction"]

    def ask(self, image: str, instruction: str, threshold: float, request: gr.Request) -> Iterator[tuple]:
        """(page, name of the answer), again and again while it grows."""
        for shown in self.demo.ask(image, instruction, threshold, request):
            yield self.html(shown), shown.question

    def steer(self, question: str, threshold: float, event: gr.EventData, request: gr.Request) -> str:
        """The page with one concept changed."""
        action = getattr(event, "action", None)
        change = {"off": 0.0, "double": 2.0}.get(str(action), getattr(event, "other", None))
        return self.html(self.demo.change(question, getattr(event, "concept", None), change, threshold, request))

    def foretell(self, question: str, threshold: float, event: gr.EventData, request: gr.Request) -> str:
        """What could be done with a concept, for `page.js`; nothing where the answer is gone."""
        concept = getattr(event, "concept", None)
        try:
            slots = self.demo.foretell(question, concept, threshold, request)
        except gr.Error:  # nobody asked for it in words; a click will say what is wrong
            slots = {}
        told = {"concept": concept, "turn": getattr(event, "turn", None), "slots": slots}
        return f"<i data-told='{escape(json.dumps(told))}'></i>"

    def undo(self, question: str, threshold: float, event: gr.EventData, request: gr.Request) -> str:
        """The page without the change of one concept, or with nothing changed."""
        return self.html(self.demo.restore(question, threshold, request, getattr(event, "concept", None)))

    def rethreshold(self, question: str, threshold: float, request: gr.Request) -> Any:
        """The page with other slots kept."""
        shown = self.demo.rethreshold(question, threshold, request)
        return gr.skip() if shown is None else self.html(shown)


def page(demo: Demo) -> gr.Blocks:
    """The page, wired to the demo. Elements that a visitor or a test looks for carry an elem_id."""
    calls, tools = Page(demo), Tools(demo)
    about = f"{ABOUT}\n\n{KNOWS.format(millions=millions(demo.model))}" if demo.small else ABOUT
    js = (HERE / "page.js").read_text(encoding="utf-8")
    with gr.Blocks(title="SegCompass: why this mask?", analytics_enabled=False, delete_cache=(600, 1800)) as blocks:
        gr.Markdown(about, elem_id="about")
        answer = gr.State()  # names the visitor's answer, which the demo keeps
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    type="filepath", image_mode=None, format="png", label="Image", height=236, elem_id="image"
                )
            with gr.Column(scale=3, min_width=280):
                instruction = gr.Textbox(
                    label="What to find",
                    placeholder="everything to the left of the blue star",
                    elem_id="instruction",
                    max_length=MAX_TEXT,
                )
                with gr.Row():
                    threshold = gr.Slider(
                        0, 1, 0.5, step=0.05, label="Confidence needed", elem_id="threshold", min_width=200
                    )
                    ask = gr.Button("Segment", variant="primary", elem_id="ask", min_width=120)
        chosen = None
        if calls.examples:
            chosen = gr.HTML(cards(calls.examples), js_on_load=EXAMPLES_JS, apply_default_css=False, elem_id="examples")
        why = gr.HTML(waiting_page(), js_on_load=js, apply_default_css=False, elem_id="why")
        told = gr.HTML("", js_on_load=TOLD_JS, apply_default_css=False, elem_id="told")  # page.css hides it

        ours: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asking = {**ours, "concurrency_limit": AT_ONCE + MAX_WAITING, "concurrency_id": "ask"}
        asked = [image, instruction, threshold], [why, answer]
        gr.on([ask.click, instruction.submit], calls.ask, *asked, **asking)
        if chosen is not None:
            chosen.take(calls.take, None, [image, instruction], **ours).then(calls.ask, *asked, **asking)
        for changed in (
            why.steer(calls.steer, [answer, threshold], why, **ours),
            why.undo(calls.undo, [answer, threshold], why, **ours),
            threshold.change(
                calls.rethreshold, [answer, threshold], why, js=BUSY_JS, trigger_mode="always_last", **ours
            ),
        ):
            changed.success(None, js=SETTLED_JS, **ours)  # also when the page is as it was
            changed.failure(None, js=SETTLED_JS, **ours)
        why.foretell(calls.foretell, [answer, threshold], told, trigger_mode="multiple", **ours)
        blocks.unload(demo.leave)
        add_api(tools)
    return blocks.queue(max_size=4 * (AT_ONCE + MAX_WAITING))


def as_json(function: Callable) -> Callable:
    """The function with its name and description, answering in JSON; gradio would hand MCP clients Python."""

    @wraps(function)
    def called(*given: Any) -> str:
        return json.dumps(function(*given))

    return called


def add_api(tools: Tools) -> None:
    """The functions that programs call: as an API, and as MCP tools."""
    with gr.Row(visible=False):
        image = gr.Image(type="filepath", image_mode=None, label="image")
        instruction, threshold = gr.Textbox(label="instruction"), gr.Number(0.5, label="threshold")
        names = [gr.Textbox("", label=label) for label in ("switch_off", "double", "swap")]
        result = gr.Textbox(label="result, as JSON")

        def add(function: Callable, inputs: list) -> None:
            gr.Button().click(
                as_json(function),
                inputs,
                result,
                api_name=function.__name__,
                concurrency_limit=AT_ONCE + MAX_WAITING,
                concurrency_id="ask",
            )

        add(tools.segment, [image, instruction, threshold])
        add(tools.explain, [image, instruction, threshold])
        add(tools.change_concepts, [image, instruction, *names, threshold])


def launch(model: str, port: int | None = None) -> None:
    """Serve the page until it is stopped.

    Args:
        model: SegCompass folder or Hub id.
        port: None takes `GRADIO_SERVER_PORT`, or 7860 or the next free one.
    """
    try:
        import mcp  # noqa: F401

        serves_tools = True
    except ImportError:  # the page works without
        serves_tools = False
    plain = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["sans-serif"], font_mono=["monospace"]
    )  # no fonts from the network
    page(Demo(model)).launch(
        server_port=port,
        theme=plain,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        max_file_size=MAX_FILE,
        state_session_capacity=1000,
        mcp_server=serves_tools,
    )


if __name__ == "__main__":
    launch(model_of_the_space(HERE) or str(MINI))
