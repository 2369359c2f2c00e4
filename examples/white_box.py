"""Measure whether the white box means what it shows, by six criteria; the same as `segcompass white-box`.

python examples/white_box.py --model examples/checkpoints/mini --dataset scenes --split test --seed 1 --num-samples 300
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["white-box", *sys.argv[1:]])
