"""What does `segment` cost beside bare generation and one encoder pass, and the command beside the model?

    python benchmarks/segment.py
    python benchmarks/segment.py --device cuda --dtype bfloat16 --hidden 4096 --layers 32 --full-encoders   # 7 B

The peer of the ratio is `mllm.generate` of as many tokens, then SAM's encoder, with nothing kept and nothing decoded.
Calls of the two alternate; the ratio is of medians, at batch 1, 4 and 16. Seconds are those that one thread computed,
which other work on the machine stretches less than the clock's; with --threads and on a GPU they are the clock's. Then
`segcompass segment` is run on the shipped scene with the shipped model, loaded already: what share of its time is
neither generation nor the image encoder's? The same with the sized model, which is dictated a response with all of its
concentration tokens, and whose masks are discs: random weights draw specks, whose outlines take long. With --photograph
the sized model is also given a JPEG of that size.

Keys of RESULT: ratio (batch 1), ratio_4, ratio_16, command_outside (that share), command_seconds,
command_outside_sized, command_seconds_sized, command_outside_photograph, command_seconds_photograph, ...
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from workload import MINI, Dictation, add_size, benchmark_rows, clock_of, machine, scripted_ids, sized_model

from segcompass import segmentation
from segcompass.loading import load

SCENE = MINI.parents[1] / "scene.png"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    parser.add_argument("--image-side", type=int, default=128, help="pixels, 16 of which are an image token's side")
    parser.add_argument("--response", type=int, default=64, help="tokens written")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--photograph", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels, such as 4000 3000"
    )
    return parser.parse_args(argv)


def alternate(calls, repeats, clock):
    """{name: median seconds}; the first round warms up."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if repeat:
                seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def photograph(path, width, height):
    """Write a JPEG of smooth noise; returns its path."""
    noise = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].mul(255).byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=92)
    return path


def command_seconds(clock, model, processor, threshold=0.5, scene=SCENE):
    """Seconds of `segcompass segment` after loading: (all, generation's and the encoder's); the second of two runs."""
    within = []

    def timed(call):
        def run(*args, **kwargs):
            began = clock()
            try:
                return call(*args, **kwargs)
            finally:
                within.append(clock() - began)

        return run

    model.generate, model.get_image_embeddings = timed(model.generate), timed(model.get_image_embeddings)
    segmentation.load = lambda name: (model, processor)
    for _ in range(2):
        within.clear()
        began = clock()
        with tempfile.TemporaryDirectory() as folder:
            asked = "everything to the left of the blue star"
            segmentation.segment_image(str(scene), asked, str(MINI), Path(folder), threshold)
        whole = clock() - began
    return whole, sum(within)


def discs(module, inputs, masks):
    """One disc for each slot, in the place of logits (B, K, H, W)."""
    along = torch.arange(masks.shape[-1], device=masks.device) / masks.shape[-1]
    centres = torch.linspace(0.2, 0.8, masks.shape[1], device=masks.device)[:, None, None]
    inside = (along - centres).square() + (along[:, None] - centres).square() < 0.02  # (K, H, W)
    return torch.where(inside, 5.0, -5.0).to(masks.dtype).expand_as(masks)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    clock = clock_of(args)
    model, processor = sized_model(args, image_side=args.image_side)
    model.generation_config.eos_token_id = model.mllm.generation_config.eos_token_id = None  # write every token
    length = dict(max_new_tokens=args.response, min_new_tokens=args.response)
    rows = benchmark_rows(max(args.batches))
    result = {}

    def inputs_of(rows):
        return processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows]).to(
            args.device
        )

    for batch in args.batches:
        inputs = inputs_of([rows[index] for index in range(batch)])

        def bare(inputs=inputs):
            model.generate(**inputs, do_sample=False, **length)
            model.get_image_embeddings(inputs["encoder_pixel_values"])

        def segment(inputs=inputs):
            model.segment(**inputs, **length)

        medians = alternate({"segment": segment, "bare": bare}, args.repeats, clock)
        ratio = medians["segment"] / medians["bare"]
        result["ratio" if batch == 1 else f"ratio_{batch}"] = round(ratio, 4)
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in medians.items())
        print(f"batch {batch:<4} {shown}   {ratio:.3f}x")

    result |= {"mllm_parameters": sum(p.numel() for p in model.mllm.parameters()), "response_tokens": args.response}
    dictated = scripted_ids(model, processor, args.response, 1)[0].tolist()
    model.segment = partial(model.segment, logits_processor=[Dictation(dictated)], **length)
    model.mask_decoder.register_forward_hook(discs)
    commands = {"": load(str(MINI), args.device), "_sized": (model, processor, 0.0)}
    if args.photograph:
        folder = tempfile.TemporaryDirectory()
        where = photograph(Path(folder.name) / "photograph.jpg", *args.photograph)
        commands["_photograph"] = (model, processor, 0.0, where)
    for key, asked in commands.items():
        whole, within = command_seconds(clock, *asked)
        result[f"command_outside{key}"], result[f"command_seconds{key}"] = round(1 - within / whole, 4), round(whole, 4)
        print(f"segcompass segment {whole:.3f} s, {within:.3f} s of them generation and image encoder")
    result |= {"image_tokens": (args.image_side // 16) ** 2, **machine(args)}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
