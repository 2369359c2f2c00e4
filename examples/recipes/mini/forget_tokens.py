"""Make of the small model one whose MLLM has never seen the response's tokens, as a plain MLLM has not.

    python examples/recipes/mini/forget_tokens.py --model runs/mini/masks --output runs/mini/plain

Where it wrote `</think>` it now ends the sequence, as an MLLM does that reasons in words; the rows of `</think>` and
`<REF_POS>` are what new tokens begin with, the mean of the others. Nothing else changes. docs/training.md compares what
closing its responses and a cold start make of it.
"""

import argparse
from pathlib import Path

import torch

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor


@torch.no_grad()
def forget(model: SegCompassModel) -> None:
    """Change the rows of a model's tied embeddings in place.

    Args:
        model: whose MLLM has one matrix for embeddings and head, as the small model's has.

    Raises:
        SystemExit: it has two matrices.
    """
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # (V, width)
    if rows is not head:
        raise SystemExit("embeddings and head of this model are two matrices; take the small model.")
    new = [model.config.think_end_id, model.config.ref_token_id]
    rows[model.mllm.generation_config.eos_token_id] = rows[new[0]]
    known = torch.ones(len(rows), dtype=torch.bool)
    known[new] = False
    rows[new] = rows[known].mean(0)


def main() -> None:
    """Read, forget, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the small model")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = SegCompassModel.from_pretrained(args.model, dtype="float32")
    forget(model)
    model.save_pretrained(args.output)
    SegCompassProcessor.from_pretrained(args.model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
