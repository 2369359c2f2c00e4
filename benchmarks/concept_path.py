"""The sparse concept path against the dense masked `Linear(d_sae -> d_c)` over all tokens: time and peak memory.

    python benchmarks/concept_path.py
    python benchmarks/concept_path.py --device cuda

Both start from the same hidden states and run forward and backward, with gradients to the hidden states and to the
codebook, up to the codes that the encoder blocks would read. The dense path holds every activation of every token, as
the authors' released code does; ours selects M concepts and decodes these, with where they fired. Beside them the two
read-outs whole, from hidden states and image keys to heatmaps and confidences: "attention" is query codebook and slot
mapper on the sparse path, "grounded" what replaces both with `concept_reading="grounded"` (576 of the tokens are image
patches, 40 are words of the conclusion, keys on 64 x 64 cells). Each runs in a process of its own, in turn. Memory is
the peak above what is held before the step (weights, hidden states), so it
includes the two gradients that both hand back, kept apart in the result. Ends with a line `RESULT {json}`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from segcompass.modeling_segcompass import SegCompassConfig, SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.grounded_reading import GroundedReading
from segcompass.modeling_segcompass.query_codebook import QueryCodebook
from segcompass.modeling_segcompass.slot_mapper import SlotMapper
from segcompass.modeling_segcompass.token_layout import INSTRUCTION, token_position_features

PATHS = ("dense", "sparse", "attention", "grounded")
SIDE, WORDS, CELLS = 24, 40, 64  # image patches along a side; words of the conclusion; cells of the keys along a side


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--d-in", type=int, default=4096, help="width of the hidden states, d_π")
    parser.add_argument("--d-c", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--active", type=int, default=100, help="active features a token, about")
    parser.add_argument("--concepts", type=int, default=256, help="M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)  # the process that measures one path
    return parser.parse_args(argv)


def build(args):
    """SAE, read-outs and hidden states (1, T, d_π): about `active` of a token's features are above zero."""
    torch.manual_seed(0)
    text = {"hidden_size": args.d_in, "num_hidden_layers": 1}
    config = SegCompassConfig(
        mllm_config={"model_type": "llava", "text_config": text},
        sae_config=SparseAutoencoderConfig(d_in=args.d_in, d_sae=args.d_sae, layer=1),
        num_concepts=args.concepts,
        d_c=args.d_c,
        concept_reading="grounded" if args.path == "grounded" else "feature",
    )
    with torch.device(args.device):
        sae, z = SparseAutoencoder(config.sae_config), torch.randn(1, args.tokens, args.d_in)
        if args.path == "grounded":
            parts = torch.nn.ModuleList([GroundedReading(config)])
        else:
            parts = torch.nn.ModuleList([QueryCodebook(config), SlotMapper(config)])
        keys = torch.randn(1, config.key_channels, CELLS, CELLS)
    with torch.no_grad():
        for weight in parts.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        if args.path == "grounded":
            parts[0].init_weights()
        sae.b_enc.fill_(-statistics.NormalDist().inv_cdf(1 - args.active / args.d_sae))
    sae.W_dec = None  # no path decodes
    return sae.requires_grad_(False), parts, z.requires_grad_(), keys


def dense_step(sae, parts, z, keys):
    (sae.encode(z) @ parts[0].codebook).square().mean().backward()


def sparse_step(sae, parts, z, keys):
    parts[0].concept_tokens(sae, z, *_positions(z))[0].square().mean().backward()


def attention_step(sae, parts, z, keys):
    codebook, mapper = parts
    concepts = codebook(sae, z, *_positions(z))
    e = z[:, -concepts.representations.shape[1] :]
    cells = torch.ones(1, CELLS, CELLS, dtype=torch.bool, device=z.device)
    heatmaps, confidences = mapper(e, concepts.representations, keys, cells)
    (heatmaps.square().mean() + confidences.square().mean()).backward()


def grounded_step(sae, parts, z, keys):
    reading, patches = parts[0], SIDE**2
    words, inside = (torch.ones(1, count, dtype=torch.bool, device=z.device) for count in (WORDS, patches))
    said = z[:, -WORDS:]
    axis = (torch.arange(SIDE, device=z.device) + 0.5) / SIDE
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, patches, 2)
    _, confidences, _, account = reading.ground(sae, said, said, words, z[:, :patches], inside, xy)
    upsampling = reading.upsampling(keys, xy, xy.new_full((1, 1, 2), 1 / SIDE), inside)
    heatmaps = reading.to_keys(account["patch_heatmaps"], upsampling)
    (heatmaps.square().mean() + confidences.square().mean()).backward()


def _positions(z):
    """Which tokens may fire (all), and their position features."""
    kinds = torch.full(z.shape[:2], INSTRUCTION, device=z.device)
    where = token_position_features(kinds, z.new_zeros(*z.shape[:2], 2), z.new_zeros(z.shape[:2]))
    return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device), where


def measure(args):
    """Seconds (median) and peak bytes of one path, and the mean number of active features."""
    sae, parts, z, keys = build(args)
    with torch.no_grad():
        active = float((sae.encode(z[:, :32]) > 0).sum(-1).float().mean())
    step = {"dense": dense_step, "sparse": sparse_step, "attention": attention_step, "grounded": grounded_step}[
        args.path
    ]
    seconds, peak = [], 0
    for repeat in range(args.repeats + 1):
        z.grad = None
        parts.zero_grad()
        held = restart_peak(args.device)
        if z.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(sae, parts, z, keys)
        if z.is_cuda:
            torch.cuda.synchronize()
        if repeat:  # the first step warms up: threads start, code is read from disk
            seconds.append(time.perf_counter() - began)
            peak = max(peak, peak_memory(args.device) - held)
    gradients = sum(leaf.grad.nbytes for leaf in (z, *parts.parameters()) if leaf.grad is not None)
    return {"seconds": statistics.median(seconds), "peak": peak, "gradients": gradients, "active": active}


def restart_peak(device):
    """Forget the peak so far; return the bytes held now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark of the resident memory
    return status_bytes("VmRSS")


def peak_memory(device):
    return torch.cuda.max_memory_allocated() if device != "cpu" else status_bytes("VmHWM")


def status_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main(argv=None):
    args = parse(argv)
    if args.path:
        print(json.dumps(measure(args)))
        return None
    measured = {}
    given = sys.argv[1:] if argv is None else argv
    for path in tqdm(PATHS, unit="path"):
        command = [sys.executable, __file__, *given, "--path", path]
        # Freed tensors leave the resident memory at once: what a heap keeps would hide what the next step needs.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        measured[path] = json.loads(done.stdout.splitlines()[-1])
    dense, sparse = measured["dense"], measured["sparse"]
    print(f"d_sae {args.d_sae}, d_in {args.d_in}, d_c {args.d_c}, {args.tokens} tokens, {sparse['active']:.0f} active")
    for path in PATHS:
        print(f"{path:10}{measured[path]['seconds']:9.3f} s {measured[path]['peak'] / 2**20:9.0f} MiB")
    print(f"of the first two, gradients of codebook and hidden states: {sparse['gradients'] / 2**20:.0f} MiB")
    attention, grounded = measured["attention"], measured["grounded"]
    result = {
        "speedup": dense["seconds"] / sparse["seconds"],
        "memory_ratio": dense["peak"] / sparse["peak"],
        "dense_seconds": dense["seconds"],
        "sparse_seconds": sparse["seconds"],
        "dense_peak_mib": dense["peak"] / 2**20,
        "sparse_peak_mib": sparse["peak"] / 2**20,
        "grounded_speedup": attention["seconds"] / grounded["seconds"],
        "grounded_memory_ratio": attention["peak"] / grounded["peak"],
        "gradients_mib": sparse["gradients"] / 2**20,
        "active_features": sparse["active"],
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
    }
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    main()
