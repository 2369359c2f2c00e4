"""Print what each GPU will hold under a recipe; the same as `segcompass plan-memory`.

python examples/plan_memory.py --recipe llava-1.5-7b/grpo --strategy fsdp2
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["plan-memory", *sys.argv[1:]])
