"""Measure whether the concepts make the masks, by switching them off; the same as `segcompass faithfulness`.

python examples/faithfulness.py --model examples/checkpoints/mini --num-samples 400 --output runs/faithfulness
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["faithfulness", *sys.argv[1:]])
