"""Show which concepts made each mask, and which words and patches they fired on; the same as `segcompass explain`.

python examples/explain.py photo.jpg "the mug nearest the sink" --model PATH --output runs/mug
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["explain", *sys.argv[1:]])
