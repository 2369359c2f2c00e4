"""Draw the paper's interpretability figures of a model; the same as `segcompass interpret`.

python examples/interpret.py --model examples/checkpoints/mini --output runs/interpret
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["interpret", *sys.argv[1:]])
