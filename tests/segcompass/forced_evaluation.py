"""Runs `segcompass evaluate` with a model that writes a given response, slowly: a tiny random one writes no sense.

python tests/segcompass/forced_evaluation.py RESPONSE SECONDS_PER_BATCH [options of segcompass evaluate]
"""

import sys
import time

from segcompass.commands import evaluate
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from tests.support.scripted import Script

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
evaluate.main(arguments)
