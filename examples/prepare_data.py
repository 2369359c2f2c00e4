"""Convert a data set once to parquet files; the same as `segcompass prepare-data`.

python examples/prepare_data.py refcoco --root REFER --image-dir train2014 --output data/refcoco
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["prepare-data", *sys.argv[1:]])
