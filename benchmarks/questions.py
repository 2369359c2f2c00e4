"""How much faster are k expressions about one image evaluated together than one by one?

    python benchmarks/questions.py
    python benchmarks/questions.py --image-side 128     # 64 image tokens instead of LLaVA-1.5's 576
    python benchmarks/questions.py --device cuda --dtype bfloat16 --hidden 4096 --layers 32 --full-encoders   # 7 B

Both are `segcompass evaluate`'s own work on the same rows, processor to counts: a batch of k rows, and k batches of
one. Beside them stands the batch whose prompts are each read whole, the image being encoded once: what sharing the
prompts' beginnings adds. Calls alternate and the ratio is of medians of the seconds that one thread computed, which
other work on the machine stretches less than the clock's; with --threads they are the clock's.

Keys of RESULT: ratio (one by one / together), read_ratio (the same with responses of one token: what is left is
reading), whole_ratio, read_whole_ratio (together, but each prompt whole), seconds of each, ...
"""

import argparse
import json
import statistics
from pathlib import Path

from workload import add_size, benchmark_rows, clock_of, machine, sized_model

from segcompass.evaluation import Evaluation, predict
from segcompass.modeling_segcompass.shared_prompts import SharedPrompts


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    parser.add_argument("--image-side", type=int, default=384, help="pixels, 16 of which are an image token's side")
    parser.add_argument("--response", type=int, default=64, help="tokens written")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    clock = clock_of(args)
    model, processor = sized_model(args, image_side=args.image_side)
    model.generation_config.eos_token_id = None  # write every token
    rows = list(benchmark_rows(args.questions))
    rows = [{**rows[0], "instruction": row["instruction"], "sample_id": row["sample_id"]} for row in rows]
    run = Evaluation(Path("nowhere"), model="nothing", threshold=0.0)
    plain = SharedPrompts._is_plain

    def ask(batches, shared=True):
        SharedPrompts._is_plain = plain if shared else lambda *given: False
        return [list(predict(run, model, processor, batch)) for batch in batches]

    ways = {
        "together": lambda: ask([rows]),
        "each prompt whole": lambda: ask([rows], shared=False),
        "one by one": lambda: ask([[row] for row in rows]),
    }
    result = {}
    for prefix, response in (("read_", 1), ("", args.response)):
        model.generation_config.max_new_tokens = response
        seconds = {name: [] for name in ways}
        for repeat in range(args.repeats + 1):  # the first warms up
            for name, way in ways.items():
                began = clock()
                way()
                seconds[name] += [clock() - began] if repeat else []
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result[f"{prefix}ratio"] = round(medians["one by one"] / medians["together"], 3)
        result[f"{prefix}whole_ratio"] = round(medians["one by one"] / medians["each prompt whole"], 3)
        result[f"{prefix}seconds"] = {name: round(value, 4) for name, value in medians.items()}
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in medians.items())
        print(f"{response:>3} tokens written: {shown}   {result[f'{prefix}ratio']:.2f} x", flush=True)
    result |= {"questions": args.questions, "image_tokens": (args.image_side // 16) ** 2, **machine(args)}
    result |= {"response_tokens": args.response, "mllm_parameters": sum(p.numel() for p in model.mllm.parameters())}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
