"""Start the demo in a browser: ask for something in an image, look into the slots, switch concepts off.

    segcompass demo
    segcompass demo --model PATH --port 7861

Needs gradio: `pip install "segcompass[demo]"`. segcompass/hub_cards/space has the same page as a Space for the Hub.
"""

import argparse

from segcompass.shipped import MODEL

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("demo", __doc__)
    parser.add_argument("--model", default=str(MODEL), help=f"{options.MODEL}; default: the small model that ships")
    parser.add_argument("--port", type=int, help="default: 7860, or the next free one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError('gradio is missing, which draws the page; pip install "segcompass[demo]".') from error
    from segcompass.hub_cards.space.app import launch

    launch(args.model, args.port)
