"""Draw what trainings logged as a page; the same as `segcompass curves`.

python examples/training_curves.py runs/mini/sft --output runs/curves
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["curves", *sys.argv[1:]])
