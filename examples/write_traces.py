"""Write the reasoning traces of the cold start; the same as `segcompass write-traces`.

python examples/write_traces.py refcoco --root REFER --image-dir train2014 --output data/refcoco-traces
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["write-traces", *sys.argv[1:]])
