"""What does `segment` cost beside bare generation and one encoder pass?

    python benchmarks/segment.py

The peer of the ratio is `mllm.generate` of as many tokens, then SAM's encoder, with nothing kept and nothing decoded.
Calls of the two alternate; the ratio is of medians, at batch 1, 4 and 16. Keys of RESULT: ratio (batch 1), ratio_4,
ratio_16, ...
"""

import argparse
import json
import statistics
import time

import torch
from workload import benchmark_model, benchmark_rows


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--response", type=int, default=64, help="tokens written")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def alternate(calls, repeats):
    """{name: median seconds}; the first round warms up."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    model, processor = benchmark_model(args.hidden, args.layers)
    model.generation_config.eos_token_id = model.mllm.generation_config.eos_token_id = None  # write every token
    length = dict(max_new_tokens=args.response, min_new_tokens=args.response)
    rows = benchmark_rows(max(args.batches))
    result = {}

    def inputs_of(rows):
        return processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows])

    for batch in args.batches:
        inputs = inputs_of([rows[index] for index in range(batch)])

        def bare(inputs=inputs):
            model.generate(**inputs, do_sample=False, **length)
            model.get_image_embeddings(inputs["encoder_pixel_values"])

        def segment(inputs=inputs):
            model.segment(**inputs, **length)

        medians = alternate({"segment": segment, "bare": bare}, args.repeats)
        ratio = medians["segment"] / medians["bare"]
        result["ratio" if batch == 1 else f"ratio_{batch}"] = round(ratio, 4)
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in medians.items())
        print(f"batch {batch:<4} {shown}   {ratio:.3f}x")

    result |= {"mllm_parameters": sum(p.numel() for p in model.mllm.parameters()), "response_tokens": args.response}
    result["threads"] = args.threads
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
