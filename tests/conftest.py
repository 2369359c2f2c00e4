"""What every test stands on: no network, one thread, and the folders that tests import from."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

ROOT = Path(__file__).resolve().parents[1]
# At the end, because examples/evaluate.py would otherwise hide the library `evaluate`.
sys.path += [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "examples") if str(folder) not in sys.path]
torch.set_num_threads(1)
