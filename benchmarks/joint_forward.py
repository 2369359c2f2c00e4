"""Our forward, beside the same forward made the released code's way: same weights, same batch, same masks decoded.

    python benchmarks/joint_forward.py

The released code's way, written here from its description: every sequence is padded to prompt limit + response limit;
a first MLLM pass gives the logits of all positions and the concentration tokens' states; a second whole pass, LM head
included, over [prompt; response; response again] gives the SAE's input; the SAE encodes every token densely and decodes
what it encoded, unused; the codebook is a dense product over all features and tokens. Forward and backward are timed.
Keys of RESULT: ratio (seconds of that way over ours), ours_s, theirs_s, padded_to, ...
"""

import argparse
import json
import statistics
import time

import torch
from workload import benchmark_model, benchmark_rows, scripted_ids


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--response", type=int, default=192)
    parser.add_argument("--prompt-limit", type=int, default=140, help="the paper's 1,400 and 2,000 over ten")
    parser.add_argument("--response-limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def batch_of(model, processor, args):
    """The processor's prompt with scripted responses appended, and labels."""
    rows = benchmark_rows(args.batch)
    inputs = processor(images=list(rows["image"]), text=list(rows["instruction"]))
    ids = scripted_ids(model, processor, args.response, args.batch)
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :prompt] = -100
    return dict(inputs), prompt


def ours(model, inputs):
    output = model(**inputs)
    (output.loss + output.pred_masks.sigmoid().mean()).backward()
    return output


def theirs(model, inputs, prompt, args):
    """Two padded passes, a dense SAE with its unused decoder, a codebook over every token."""
    length = inputs["input_ids"].shape[1]
    left, right = args.prompt_limit - prompt, args.response_limit - (length - prompt)
    pad = torch.nn.functional.pad
    ids = pad(inputs["input_ids"], (left, right), value=0)
    mask = pad(inputs["attention_mask"], (left, right))
    labels = pad(inputs["labels"], (left, right), value=-100)
    pixels = dict(pixel_values=inputs["pixel_values"], output_hidden_states=True)
    first = model.mllm(input_ids=ids, attention_mask=mask, labels=labels, **pixels)
    answer = slice(args.prompt_limit, None)
    second = model.mllm(
        input_ids=torch.cat([ids, ids[:, answer]], 1),
        attention_mask=torch.cat([mask, torch.ones_like(mask[:, answer])], 1),
        **pixels,
    )
    z = second.hidden_states[model.config.sae_config.layer]
    with torch.no_grad():
        h = model.sae.encode(z)
        model.sae.decode(h)
    tokens = h @ model.query_codebook.codebook
    batch, slots = len(ids), model.config.num_slots
    x = torch.cat([model.query_codebook.slot_queries.expand(batch, -1, -1), tokens], 1)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    for block in model.query_codebook.blocks:
        x = block(x, valid)
    r = model.query_codebook.norm(x[:, :slots])
    positions = (ids == model.config.ref_token_id).nonzero()[:, 1].view(batch, slots)
    e = first.hidden_states[-1][torch.arange(batch)[:, None], positions]
    keys = model.get_image_embeddings(inputs["encoder_pixel_values"])
    grid_positions = model.key_positions(keys.shape[-2:])
    cells = torch.ones(batch, *keys.shape[-2:], dtype=torch.bool)
    heatmaps, confidences = model.slot_mapper(e, r, keys + grid_positions, cells)
    masks = torch.cat(  # a loop over the samples
        [
            model.mask_decoder(*(part[i : i + 1] if len(part) == batch else part for part in parts))
            for parts in [(keys, grid_positions, heatmaps, confidences, cells)]
            for i in range(batch)
        ]
    )
    (first.loss + masks.sigmoid().mean()).backward()


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    model, processor = benchmark_model(args.hidden, args.layers)
    inputs, prompt = batch_of(model, processor, args)
    if prompt > args.prompt_limit or args.response > args.response_limit:
        raise SystemExit(f"prompt {prompt} or response {args.response} is over its limit; raise --prompt-limit.")
    seconds = {"ours": [], "theirs": []}
    for repeat in range(args.repeats + 1):
        for name, call in (
            ("ours", lambda: ours(model, inputs)),
            ("theirs", lambda: theirs(model, inputs, prompt, args)),
        ):
            model.zero_grad()
            began = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<8}{value:8.3f} s forward and backward")
    result = {
        "ratio": round(medians["theirs"] / medians["ours"], 3),
        "ours_s": round(medians["ours"], 4),
        "theirs_s": round(medians["theirs"], 4),
        "tokens": inputs["input_ids"].shape[1],
        "padded_to": args.prompt_limit + args.response_limit,
        "mllm_parameters": sum(p.numel() for p in model.mllm.parameters()),
        "threads": args.threads,
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
