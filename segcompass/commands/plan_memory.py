"""Does a recipe fit? Print what each GPU holds, and what learns, without downloading or allocating any weight.

    segcompass plan-memory --recipe llava-1.5-7b/grpo --strategy fsdp2
    segcompass plan-memory --recipe mine.yaml --strategy ddp --lora-rank 64

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
    parser.add_argument("--lora-rank", type=int, default=0, help="rank of adapters; 0 trains the weights themselves")
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

    from segcompass.memory_plan import plan, recipe_config, report

    choices = {name: value for name, value in vars(args).items() if name != "recipe"}
    training = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    result = plan(recipe_config(recipe), training, **choices)
    report(result, f"{recipe}: {args.strategy} on {args.gpus} GPUs of {args.gpu_memory:g} GB")
    return result
