"""What strangers send to `segcompass serve` and to the endpoint, and what an MLLM may write instead of boxes."""

import base64
import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from PIL import Image

from segcompass.box_formats import FORMATS
from segcompass.modeling_segcompass.answering import Limits, flattened, read_question

from . import Attack
from .bombs import png

MODEL = SimpleNamespace(
    concept_labels={0: "red"}, grounded=True, config=SimpleNamespace(sae_config=SimpleNamespace(d_sae=8))
)
LIMITS = Limits(bytes=300_000, pixels=1_000_000, characters=1000, concepts=10)


def _image(form: str = "PNG", **settings: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, form, **settings)
    return content.getvalue()


def _ask(**fields: Any) -> Any:
    question = read_question({"image": _image(), "instruction": "it", **fields}, MODEL, LIMITS)
    return question.image.size == (8, 8)


def attacks() -> Iterator[Attack]:
    """Yields the attacks."""
    nowhere = "an address or a path; nothing is fetched or opened here"
    for address in (
        *("/etc/passwd", "../../etc/passwd", "~/.ssh/id_rsa", "file:///etc/passwd", "FILE:///etc/passwd"),
        *("http://127.0.0.1:1/a.png", "https://[::1]/a.png", "ftp://localhost/a", "\\\\server\\share", "gopher://x/"),
    ):
        yield Attack(f"question: the image is {address}", lambda _, address=address: _ask(image=address), nowhere)
    yield Attack(
        "question: a data: URL without base64", lambda _: _ask(image="data:text/html,<script>"), "without base64"
    )
    bombs = {
        "50,000 x 50,000 pixels": png(50_000, 50_000),
        "1,001 x 1,000 pixels": png(1_001, 1_000, b"", 1_000),
        "a TIFF of many pages": _image(
            "TIFF", save_all=True, append_images=[Image.new("RGB", (2000, 2000))], compression="tiff_lzw"
        ),
    }
    for name, content in bombs.items():
        text = base64.b64encode(content).decode()
        refusal = "" if "pages" in name else "pixels|cannot be read"  # the first page is the image
        yield Attack(f"question: {name}", lambda _, text=text: _ask(image=text), refusal)
    yield Attack("question: 400 kB of base64", lambda _: _ask(image="A" * 500_000), "the limit is 300,000")
    for name, content in {
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch owned) system\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "PDF": b"%PDF-1.4\n1 0 obj<</JS (app.alert(1))>>",
        "MPO": b"\xff\xd8\xff\xe0" + bytes(200),
        "a pickle": b"cos\nsystem\n(S'touch owned'\ntR.",
    }.items():
        yield Attack(f"question: an image that is {name}", lambda _, c=content: _ask(image=c), "cannot be read")
    yield Attack("question: 1,001 characters", lambda _: _ask(instruction="x" * 1001), "the limit is 1,000")
    yield Attack("question: half a character", lambda _: _ask(instruction="it \ud800"), "half a character")
    yield Attack(
        "question: concepts by the thousand",
        lambda _: _ask(concept_scale={str(number): 0 for number in range(1000)}),
        "names 1,000 concepts",
    )
    for value in (float("nan"), 1e31, "0", True, [0], {"__class__": 0}):
        yield Attack(
            f"question: the factor {value!r}",
            lambda _, value=value: _ask(concept_scale={"red": value}),
            "it must be {concept: number}",
        )
    yield Attack(
        "question: fields under two names",
        lambda _: flattened({"inputs": {"image": 1}, "parameters": {"image": 2}}),
        "twice",
    )
    yield Attack(
        "question: a field of Python's",
        lambda _: _ask(**{"__class__": "x"}),
        "there is no field '__class__'",
    )
    deep = "[" * 500 + "]" * 500
    yield Attack(
        "question: a deep instruction", lambda _: _ask(instruction=json.loads(deep)), "instruction is of type list"
    )

    for name, written in FORMATS.items():

        def points_nowhere(text: str, written: Any = written) -> bool:
            return not written.read(text, (640, 480), (644, 476)).regions

        for what, text in {
            "digits without end": "[" + "1" * 50_000,
            "digits without end in a tag": '<point x="' + "9" * 50_000,
            "brackets without end": "[" * 50_000,
            "spaces without end": "[" + " " * 50_000 + "1",
            "numbers beyond all numbers": "[" + ",".join(["9" * 400] * 4) + "]",
            "reasoning without end": "<think>" + "[1, 2, 300, 400]" * 2000,
            "what it thought of": "<think>[1, 2, 300, 400]</think><answer></answer>",
            "exponents": "[1e2, 1e2, 9e2, 9e2]",
        }.items():
            yield Attack(f"boxes of {name}: {what}", lambda _, text=text, p=points_nowhere: p(text))
