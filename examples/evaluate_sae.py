"""Measure a sparse autoencoder; the same as `segcompass evaluate-sae`.

python examples/evaluate_sae.py --model examples/checkpoints/mini --output runs/sae-quality
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["evaluate-sae", *sys.argv[1:]])
