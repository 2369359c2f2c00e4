"""Judge a sparse autoencoder on held-out rows: what it reconstructs, how sparsely, and what the MLLM loses by it.

    segcompass evaluate-sae --model PATH --output runs/sae-quality
    segcompass evaluate-sae --model llava-hf/llava-1.5-7b-hf --sae ORG/SAE --dataset rows.jsonl --output DIR

Everything is given for all tokens but the special ones, which the SAE is not made for, and for each token type (image,
instruction, response, special). Writes
    quality.json   explained variance, FVU, L0, dead share, density histogram, L2 ratio, relative reconstruction bias
                   (docs/sae.md has the formulas), and the language-model loss
    quality.png    explained variance and L0 by type, and the density histogram
    quality.md     the table of the card

The language-model loss recovered is (zero - spliced) / (zero - clean), where the reconstruction, or zeros, replace the
hidden states of layer L at the tokens of a type: 1 if nothing is lost, 0 if the reconstruction is no better than zeros.
"""

import argparse

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("evaluate-sae", __doc__)
    parser.add_argument("--model", required=True, help=f"{options.MODEL}, or those of an MLLM")
    parser.add_argument("--sae", help="SAE folder or Hub id; default: the SegCompass model's own")
    options.add_rows(parser, "val", 500, dataset=options.TEXT_ROWS)
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="samples the MLLM reads at once; default: %(default)s"
    )
    parser.add_argument(
        "--token-window",
        type=options.positive,
        default=3400,
        help="skip, and count, samples of more tokens than this; default: %(default)s",
    )
    parser.add_argument("--output", type=options.folder, required=True, help="folder that the results are written into")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run the command with these options (None takes the process's own) and return what quality.json holds."""
    args = parse(argv)
    from segcompass.sae_evaluation import judge_sae

    return judge_sae(**vars(args))
