"""Push a model, an SAE, a data set or the metric to the Hub, with its card; the same as `segcompass push`.

python examples/push_to_hub.py sae runs/mini/sae USER/sae-mini --quality runs/mini/sae/quality.json
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
