"""Train a sparse autoencoder on an MLLM's hidden states; the same as `segcompass train sae`.

python examples/train_sae.py --config mini/sae
accelerate launch examples/train_sae.py --config RECIPE.yaml
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["train", "sae", *sys.argv[1:]])
