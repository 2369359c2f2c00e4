"""Compare a saved folder with its manifest, every byte of it; the same as `segcompass verify`.

python examples/verify.py examples/checkpoints/mini
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
