"""Segment what an instruction means in an image, and draw every step.

    segcompass segment
    segcompass segment photo.jpg "the mug nearest the sink" --model PATH --output runs/mug --explain

Prints the reasoning and the instances, and writes into the output folder
    overlay.png   image, concept activations, heatmaps and masks side by side
    masks.png     label image: 0 background, k + 1 = instance k
    result.json   instruction, text, no_target, instances, concepts
and with --explain
    explanation.html   each shown slot: its concepts by weight, the words and patches they fired on, heatmap and mask
    explanation.png    the same of the most confident slot as a figure
Concepts are shown with their labels where the model's folder holds a concepts.json (`segcompass dictionary` makes it).
`no_target` is true when the model looked and no slot was confident enough. A response without concentration tokens is
no such answer: then `no_target` is false and `instances` is empty. Without arguments the scene that ships with the
package is segmented by the small model that does too.
"""

import argparse

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options, with the shipped scene where no image is named."""
    parser = options.command_parser("segment", __doc__)
    options.add_image(parser, output="runs/segment", fate="kept")
    parser.add_argument("--explain", action="store_true", help="also write which concepts made the masks")
    args = parser.parse_args(argv)
    options.fill_image(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    from segcompass.segmentation import segment_image

    segment_image(args.image, args.instruction, args.model, args.output, args.threshold, args.explain)
