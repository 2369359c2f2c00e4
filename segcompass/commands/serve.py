"""Serve a model over HTTP: an image and an instruction in; text, masks and concepts out.

    segcompass serve
    segcompass serve --model PATH --host 0.0.0.0 --port 8000 --batch-size 16

    curl -F image=@photo.jpg -F instruction="the mug nearest the sink" http://127.0.0.1:8000/segment
    curl -N -F image=@photo.jpg -F instruction="the mug" -F stream=true http://127.0.0.1:8000/segment

Answers are JSON: the reasoning, the instances with COCO run lengths, polygons and scores, and their concepts by name.
/docs has all fields, /health the state, /openapi.json the description for programs. Requests that wait are answered
together. Ctrl-C finishes what was begun and ends. Needs fastapi and uvicorn: `pip install "segcompass[serve]"`.
There is no password and no encryption: put a proxy that has them in front before you open it to others.
"""

import argparse
from functools import partial

from segcompass.shipped import MODEL

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("serve", __doc__)
    parser.add_argument("--model", default=str(MODEL), help=f"{options.MODEL}; default: the small model that ships")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: %(default)s, this machine")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one; default: %(default)s")
    numbers = {
        "--batch-size": (8, "questions answered together at most"),
        "--max-waiting": (32, "questions that may wait besides; one more is refused with status 429"),
        "--patience": (60, "seconds that a question may take to arrive and to wait for its turn (status 408 or 503)"),
        "--max-bytes": (20_000_000, "of an image file"),
        "--max-pixels": (25_000_000, "of an image"),
        "--max-characters": (1000, "of an instruction"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(name, type=options.positive, default=default, help=f"{meaning}; default: %(default)s")
    return parser.parse_args(argv)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number from 0 to 65535.")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f'{error.name} is missing, which serves; pip install "segcompass[serve]".') from error
    from segcompass.modeling_segcompass.answering import Limits
    from segcompass.serve import Settings, serve

    limits = Limits(bytes=args.max_bytes, pixels=args.max_pixels, characters=args.max_characters)
    settings = Settings(args.host, args.port, args.batch_size, args.max_waiting, args.patience, limits)
    serve(args.model, settings, partial(print, flush=True))
