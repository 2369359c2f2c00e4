"""Show which concepts made each mask, and which words and patches they fired on: a page for one image and instruction.

    segcompass explain
    segcompass explain photo.jpg "the mug nearest the sink" --model PATH --output runs/mug

Writes into the output folder
    explanation.html   each shown slot: its concepts by weight, the words and patches they fired on, heatmap and mask
    explanation.png    the same of the most confident slot as a figure
The slots whose confidence reaches the threshold are shown; the most confident one, when none does. Concepts are shown
with their labels where the model's folder holds a concepts.json (`segcompass dictionary` makes it). Without arguments
the scene that ships with the package is explained by the small model that does too.
"""

import argparse

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options, with the shipped scene where no image is named."""
    parser = options.command_parser("explain", __doc__)
    options.add_image(parser, output="runs/explain", fate="shown")
    args = parser.parse_args(argv)
    options.fill_image(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    import torch

    from segcompass.loading import load
    from segcompass.modeling_segcompass.images import read_image
    from segcompass.segmentation import explain_slots, slot_heatmaps, write_explanation
    from segcompass.shipped import notes_on

    image = read_image(args.image)
    model, processor = load(args.model)
    for note in notes_on(model, processor.tokenizer, args.image, args.instruction)[1]:
        print(note)
    inputs = processor(images=image, text=args.instruction).to(model.device)
    with torch.no_grad():
        keys = model.get_image_embeddings(inputs.pop("encoder_pixel_values"))
    outputs = model.segment(**inputs, image_embeddings=keys)
    kept = processor.post_process_instance_segmentation(outputs, args.threshold, target_sizes=inputs["original_sizes"])
    slots = [slot for slot, _, _ in slot_heatmaps(outputs, processor, image, kept[0]["slots"].tolist())]
    args.output.mkdir(parents=True, exist_ok=True)
    explanations = explain_slots(model, processor, outputs, slots, model.concept_labels, keys)
    write_explanation(args.output, model, processor, outputs, image, args.instruction, explanations)
