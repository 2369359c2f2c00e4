"""Joint training: GRPO on the reasoning, supervision on the masks; the same as `segcompass train grpo`.

python examples/train_grpo.py --config mini/grpo
accelerate launch examples/train_grpo.py --config RECIPE.yaml --use-peft --lora-r 64
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["train", "grpo", *sys.argv[1:]])
