"""Merge trained adapters into the model that they were trained on; the same as `segcompass merge`.

python examples/merge_adapters.py runs/mine --model runs/llava-1.5-7b/sft --output runs/merged
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
