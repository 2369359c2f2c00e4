"""Score a model, or any model's predictions, on a data set; the same as `segcompass evaluate`.

    python examples/evaluate_model.py --model PATH --dataset scenes --split test --output runs/test
    accelerate launch examples/evaluate_model.py --model PATH --dataset refcoco --root REFER --image-dir train2014 \\
        --split testA --output runs/testA
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
