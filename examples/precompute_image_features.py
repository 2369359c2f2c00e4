"""Encode a data set's images once; the same as `segcompass precompute-features`.

python examples/precompute_image_features.py --model PATH --dataset FOLDER --split train --output runs/features
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["precompute-features", *sys.argv[1:]])
