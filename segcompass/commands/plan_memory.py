"""Does a recipe fit? Print what each GPU holds, and what learns, without downloading or allocating any weight.

    segcompass plan-memory --recipe llava-1.5-7b/grpo --strategy fsdp2
    segcompass plan-memory --recipe mine.yaml --strategy ddp --lora-rank 64
    segcompass plan-memory --recipe qwen2.5-vl-3b-24gb/grpo --strategy ddp --gpus 1 --gpu-memory 24    # QLoRA
    segcompass plan-memory --recipe llava-1.5-7b/sae

Parameters are counted at the backbones' real dimensions; activations are what autograd would save. The LM head and the
fragmentation of the allocator are estimates. Nothing here was compared with a GPU.
"""

import argparse

from segcompass.recipes import find_recipe

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("plan-memory", __doc__)
    parser.add_argument("--recipe", required=True, help="a recipe's file, or a name that `segcompass recipes` lists")
    parser.add_argument(
        "--strategy",
        choices=["ddp", "zero2", "fsdp2", "zero3"],
        default="fsdp2",
        help="how the GPUs share the model; default: %(default)s",
    )
    parser.add_argument("--gpus", type=options.positive, default=8, help="how many GPUs; default: %(default)s")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB of one GPU; default: %(default)s")
    parser.add_argument(
        "--lora-rank", type=int, help="rank of adapters; 0 trains the weights themselves; default: as the recipe says"
    )
    parser.add_argument("--four-bit", action="store_true", help="the MLLM in 4 bits, if the recipe does not say so")
    parser.add_argument(
        "--prompt-length",
        type=options.positive,
        default=1400,
        help="tokens of image and instruction; default: %(default)s",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run the command with these options (None takes the process's own) and return the plan."""
    args = parse(argv)
    recipe = find_recipe(args.recipe)
    import yaml

    from segcompass.memory_plan import plan, plan_sae, recipe_choices, recipe_config, report, report_sae

    training = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if recipe.stem == "sae" or "tokens_per_batch" in training:
        result = plan_sae(recipe, args.gpu_memory)
        report_sae(result, f"{recipe}: on each GPU of {args.gpu_memory:g} GB")
        return result
    choices = {name: getattr(args, name) for name in ("strategy", "gpus", "gpu_memory", "prompt_length")}
    choices |= recipe_choices(training)
    if args.lora_rank is not None:
        choices["lora_rank"] = args.lora_rank
    choices["four_bit"] |= args.four_bit
    result = plan(recipe_config(recipe), training, **choices)
    report(result, f"{recipe}: {args.strategy} on {args.gpus} GPUs of {args.gpu_memory:g} GB")
    return result
