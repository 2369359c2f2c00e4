"""How fast the SAE trainer is beside SAELens, EleutherAI's sparsify and a plain PyTorch loop; what its source costs.

    pip install -e ".[peers]"                        # SAELens and sparsify; without them their ratios are null
    python benchmarks/sae_training.py                # d_in 512, d_sae 4096, batch 4096, and peak memory
    python benchmarks/sae_training.py --short        # d_in 256, d_sae 2048, batch 2048, within 50 s
    python benchmarks/sae_training.py --short --cpu  # by the processor's seconds, where other work is on the machine
    python benchmarks/sae_training.py --device cuda --d-in 4096 --d-sae 65536    # ours and the plain loop, on a GPU

All train a TopK autoencoder of one width on the same float32 batches with Adam: ours with `SparseAutoencoderTrainer`
and all that it follows and logs, SAELens with its `SAETrainer`, sparsify with its `SparseCoder` in the steps of its
trainer (which itself wants a text model), and the plain loop with autograd through dense products, a step and no more.
They take turns, and a contender's time is its best turn. `relu_pairs` is the median, over the turns, of the plain
loop's seconds by ours. `relu_` keys compare ours, SAELens' standard SAE and the plain
loop on ReLU + L1, where nothing can be left out. Then: what stopping the MLLM at layer L of its depth saves.
"""

import argparse
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from concept_path import status_bytes
from torch.utils.data import IterableDataset
from transformers import LlavaConfig, LlavaForConditionalGeneration, TrainerCallback

from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.trainers.activations import layer_hidden_states
from segcompass.trainers.sae_trainer import SparseAutoencoderTrainer, SparseAutoencoderTrainerConfig

K, L1, LR = 32, 0.5, 1e-3
CLOCK = {"now": time.perf_counter}
DEVICE = {"name": "cpu"}


class Batches(IterableDataset):
    """Sums of 16 of 4 d_in atoms with noise: the same list of batches to everybody, again and again."""

    def __init__(self, d_in, batch_size, number=8):
        generator = torch.Generator().manual_seed(0)
        atoms = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
        self.batches = []
        for _ in range(number):
            active = torch.randint(4 * d_in, (batch_size, 16), generator=generator)
            strength = 1 + torch.rand(batch_size, 16, generator=generator)
            z = (atoms[active] * strength[..., None]).sum(1) + 0.05 * torch.randn(batch_size, d_in, generator=generator)
            self.batches.append(z)

    def __iter__(self):
        return iter(self.batches)

    def endless(self):
        while True:
            yield from self.batches


# -- the contenders: each is called with a number of steps and returns seconds a step ----------------------------------


def ours(data, shape, activation):
    with torch.device(DEVICE["name"]):
        sae = SparseAutoencoder(SparseAutoencoderConfig(**shape, activation=activation, k=K))
    folder = tempfile.mkdtemp()

    def run(steps):
        args = SparseAutoencoderTrainerConfig(
            output_dir=folder,
            max_steps=steps + 2,
            learning_rate=LR,
            l1_coefficient=L1,
            calibration_tokens=1,
            strength_tokens=1,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=DEVICE["name"] == "cpu",
        )
        trainer = SparseAutoencoderTrainer(sae, args, train_dataset=data)
        clock = Clock(2, steps + 2)
        trainer.add_callback(clock)
        trainer.train()
        return (clock.ends[1] - clock.ends[0]) / steps

    return run


class Clock(TrainerCallback):
    """When these steps ended; the others are not waited for."""

    def __init__(self, *steps):
        self.steps, self.ends = steps, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.ends.append(CLOCK["now"]())


def timed(step, data):
    """A contender from a function of one batch."""
    batches = data.endless()

    def run(steps):
        step(next(batches))
        began = CLOCK["now"]()
        for _ in range(steps):
            step(next(batches))
        return (CLOCK["now"]() - began) / steps

    return run


def saelens(data, shape, activation):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    if activation == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=K))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=L1))
    tokens = len(data.batches[0])
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=tokens,
        lr=LR,
        lr_end=LR,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data.endless())

    def step(z):
        trainer.step(z)
        trainer.n_training_steps += 1

    return timed(step, data)


def sparsify(data, shape, activation):
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(shape["d_in"], SparseCoderConfig(num_latents=shape["d_sae"], k=K))
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)
    fired = torch.zeros(shape["d_sae"], dtype=torch.bool)

    def step(z):
        coder.set_decoder_norm_to_unit_norm()
        out = coder(z)
        out.fvu.backward()
        fired[out.latent_indices.flatten()] = True
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, data)


def plain(data, shape, activation):
    d_in, d_sae = shape["d_in"], shape["d_sae"]
    with torch.device(DEVICE["name"]):
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        parameters = [W_dec.T.clone(), torch.zeros(d_sae), W_dec, torch.zeros(d_in)]
    W_enc, b_enc, W_dec, b_dec = parameters = [parameter.requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)

    def step(z):
        z = z.to(DEVICE["name"])
        h = torch.relu(z @ W_enc + b_enc)
        if activation == "topk":
            values, indices = h.topk(K, dim=-1, sorted=False)
            h = torch.zeros_like(h).scatter(-1, indices, values)
        loss = (z - h @ W_dec - b_dec).square().sum(1).mean()
        if activation == "relu":
            loss = loss + L1 * (h @ W_dec.norm(dim=1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, data)


def after_all_work():
    """The clock's seconds, when the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


CONTENDERS = {"ours": ours, "saelens": saelens, "sparsify": sparsify, "plain_loop": plain}
PACKAGES = {"saelens": "sae_lens", "sparsify": "sparsify"}


def installed(activation):
    names = [name for name in CONTENDERS if name not in PACKAGES or importlib.util.find_spec(PACKAGES[name])]
    names = [name for name in names if DEVICE["name"] == "cpu" or name not in PACKAGES]
    return [name for name in names if activation == "topk" or name != "sparsify"]


def race(data, shape, activation, turns, steps):
    """Tokens a second of each contender, by its best turn, and the median of the turns' plain loop by ours."""
    runs = {name: CONTENDERS[name](data, shape, activation) for name in installed(activation)}
    seconds = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            seconds[name].append(run(steps))
    pairs = [plain / ours for plain, ours in zip(seconds["plain_loop"], seconds["ours"], strict=True)]
    return {name: len(data.batches[0]) / min(turn) for name, turn in seconds.items()}, statistics.median(pairs)


def peak_memory(name, arguments):
    """MB that three steps of a contender add to its process, from a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, *(["--short"] if arguments.short else [])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def source(width, depth, layer, turns):
    """Seconds of a whole forward pass of an MLLM and of one that stops at layer L, by the best turn."""
    text = dict(model_type="llama", hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth)
    text |= dict(num_attention_heads=8, num_key_value_heads=8, vocab_size=1024)
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, image_size=32, patch_size=16, projection_dim=32)
    mllm = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    inputs = {"input_ids": torch.randint(5, 1000, (8, 128)), "attention_mask": torch.ones(8, 128, dtype=torch.long)}
    best = [float("inf")] * 2
    for _ in range(turns + 1):
        began = time.perf_counter()
        with torch.no_grad():
            mllm.model(**inputs, use_cache=False)
        middle = time.perf_counter()
        layer_hidden_states(mllm, inputs, layer)
        best = [min(best[0], middle - began), min(best[1], time.perf_counter() - middle)]
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="smaller, within 50 s")
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor instead of the clock's")
    parser.add_argument("--turns", type=int, help="of each contender; default: 3 in the short form, else 5")
    parser.add_argument("--device", default="cpu", help="another than the CPU: ours and the plain loop alone")
    parser.add_argument("--d-in", type=int)
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--batch", type=int, help="tokens of a step")
    parser.add_argument("--memory-of", choices=CONTENDERS, help="print the memory of one contender (used by itself)")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    shape = {"d_in": 256, "d_sae": 2048} if arguments.short else {"d_in": 512, "d_sae": 4096}
    shape = {"d_in": arguments.d_in or shape["d_in"], "d_sae": arguments.d_sae or shape["d_sae"]}
    data = Batches(shape["d_in"], arguments.batch or (2048 if arguments.short else 4096))
    DEVICE["name"] = arguments.device
    if arguments.memory_of:
        before = status_bytes("VmHWM")  # ru_maxrss would also count what the parent held when it started this process
        CONTENDERS[arguments.memory_of](data, shape, "topk")(3)
        print((status_bytes("VmHWM") - before) / 2**20)
        return
    turns, steps = (3, 2) if arguments.short else (5, 8)
    turns = arguments.turns or turns
    CLOCK["now"] = time.process_time if arguments.cpu else time.perf_counter
    result = {"device": "cpu", **shape, "threads": torch.get_num_threads()}
    if arguments.device != "cpu":
        CLOCK["now"] = after_all_work
        result["device"] = torch.cuda.get_device_name()
    for activation, prefix in (("topk", ""), ("relu", "relu_")):
        speed, result[f"{prefix}pairs"] = race(data, shape, activation, turns, steps)
        print(f"\n{activation}: tokens a second, {shape}, {torch.get_num_threads()} threads")
        for name, tokens in speed.items():
            print(f"  {name:<12}{tokens:>12,.0f}")
            if name != "ours":
                result[f"{prefix}vs_{name}"] = round(speed["ours"] / tokens, 3)
        result[f"{prefix}tokens_per_second"] = round(speed["ours"])
    if not arguments.short and arguments.device == "cpu":
        result["peak_memory_mb"] = {name: round(peak_memory(name, arguments)) for name in installed("topk")}
        print(f"\npeak memory of three TopK steps, MB: {result['peak_memory_mb']}")
    if arguments.device == "cpu":
        depth, layer = 8, 4
        whole, stopped = source(256 if arguments.short else 512, depth, layer, turns)
        result["source_saved"], result["source_expected"] = round(1 - stopped / whole, 3), 1 - layer / depth
        print(f"\nactivation source: stopping at layer {layer} of {depth} saves {result['source_saved']:.1%}")
    for name in PACKAGES:
        result.setdefault(f"vs_{name}", None)
    result |= {name: round(value, 3) for name, value in result.items() if name.endswith("pairs")}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
