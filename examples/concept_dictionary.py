"""List what each concept of a model fires on, and name the concepts; the same as `segcompass dictionary`.

python examples/concept_dictionary.py --model examples/checkpoints/mini --output runs/dictionary
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["dictionary", *sys.argv[1:]])
