"""Cold start: reasoning and masks from reference traces; the same as `segcompass train sft`.

python examples/train_sft.py --config mini/masks
accelerate launch examples/train_sft.py --config RECIPE.yaml --learning-rate 1e-5
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["train", "sft", *sys.argv[1:]])
