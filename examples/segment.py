"""Segment what an instruction means in an image; the same as `segcompass segment`.

python examples/segment.py
python examples/segment.py photo.jpg "the mug nearest the sink" --model PATH --output runs/mug --explain
"""

import sys

from segcompass.cli import main

if __name__ == "__main__":
    main(["segment", *sys.argv[1:]])
