"""Runs examples/evaluate.py with a model that writes a given response, slowly: a tiny random one writes no sense.

python tests/examples/forced_evaluate.py RESPONSE SECONDS_A_BATCH [arguments of evaluate.py]
"""

import importlib.util
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "examples"))

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor  # noqa: E402
from tests.support.scripted import Script  # noqa: E402

response, pause = sys.argv[1], float(sys.argv[2])
arguments = sys.argv[3:]
tokenizer = SegCompassProcessor.from_pretrained(arguments[arguments.index("--model") + 1]).tokenizer
load = SegCompassModel.from_pretrained


def load_and_force(*args, **kwargs):
    model = load(*args, **kwargs)
    generate = model.mllm.generate

    def forced(input_ids, **inputs):
        time.sleep(pause)
        script = Script(tokenizer, [response] * len(input_ids))
        return generate(input_ids=input_ids, logits_processor=[script], **inputs)

    model.mllm.generate = forced
    return model


SegCompassModel.from_pretrained = load_and_force
spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "examples" / "evaluate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.main(arguments)
