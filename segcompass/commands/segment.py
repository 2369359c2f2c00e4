"""Segment what an instruction means in an image, and draw every step.

    segcompass segment
    segcompass segment photo.jpg "the mug nearest the sink" --model PATH --output runs/mug --explain
    segcompass segment photo.jpg "the mug nearest the sink" --route boxes --mllm Qwen/Qwen2.5-VL-7B-Instruct \\
        --image-encoder facebook/sam-vit-huge

Prints the reasoning and the instances, and writes into the output folder
    overlay.jpg   image, concept activations, heatmaps and masks side by side
    masks.png     label image: 0 background, k + 1 = instance k
    result.json   instruction, text, no_target, instances, concepts, unknown_words
and with --explain
    explanation.html   each shown slot: its concepts by weight, the words and patches they fired on, heatmap and mask
    explanation.png    the same of the most confident slot as a figure
Concepts are shown with their labels where the model's folder holds a concepts.json (`segcompass dictionary` makes it).
`no_target` is true when the model looked and no slot was confident enough. A response without concentration tokens is
no such answer: then `no_target` is false and `instances` is empty. `unknown_words` are those of the instruction that
the small model never learned, so that its answer is a guess; of other models that is not known. Without arguments the
scene that ships with the package is segmented by the small model that does too.

--route boxes needs no trained SegCompass model, and so is the one for photographs: an MLLM of the Hub writes boxes, SAM
makes a mask of each. Then overlay.jpg has the boxes in place of concepts and heatmaps, and result.json also
    prompts    what the answer points at, in pixels, by slot
    left_out   how many boxes of the answer have no area or lie outside the image
    fault      why there is no mask though the MLLM did not say that nothing is there, or null
A score is SAM's own estimate of the mask's IoU, and without --threshold all masks are kept.
"""

import argparse

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options, with the shipped scene where no image is named."""
    parser = options.command_parser("segment", __doc__)
    options.add_image(parser, output="runs/segment", fate="kept")
    options.add_route(parser)
    parser.add_argument("--explain", action="store_true", help="also write which concepts made the masks")
    parser.set_defaults(threshold=None)
    args = parser.parse_args(argv)
    options.check_route(parser, args, parser.get_default("model"))
    if args.explain and args.route != "concepts":
        parser.error(f"--explain shows concepts, and the route {args.route} has none; use --route concepts.")
    options.fill_image(parser, args)
    if args.threshold is None:
        args.threshold = 0.0 if args.route == "boxes" else 0.5
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    from segcompass.segmentation import segment_image, segment_image_by_boxes

    if args.route == "boxes":
        segment_image_by_boxes(args.image, args.instruction, args.mllm, args.image_encoder, args.output, args.threshold)
    else:
        segment_image(args.image, args.instruction, args.model, args.output, args.threshold, args.explain, args.route)
