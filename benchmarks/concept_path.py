"""The sparse concept path against the dense masked `Linear(d_sae -> d_c)` over all tokens: time and peak memory.

    python benchmarks/concept_path.py
    python benchmarks/concept_path.py --device cuda

Both start from the same hidden states and run forward and backward, with gradients to the hidden states and to the
codebook, up to the codes that the encoder blocks would read. The dense path holds every activation of every token, as
the authors' released code does; ours selects M concepts and decodes these, with where they fired. Each runs in a
process of its own, in turn. Memory is the peak above what is held before the step (weights, hidden states), so it
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
from segcompass.modeling_segcompass.query_codebook import QueryCodebook
from segcompass.modeling_segcompass.token_layout import INSTRUCTION, token_position_features

PATHS = ("dense", "sparse")


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
    """SAE, codebook and hidden states (1, T, d_π): about `active` of a token's features are above zero."""
    torch.manual_seed(0)
    text = {"hidden_size": args.d_in, "num_hidden_layers": 1}
    config = SegCompassConfig(
        mllm_config={"model_type": "llava", "text_config": text},
        sae_config=SparseAutoencoderConfig(d_in=args.d_in, d_sae=args.d_sae, layer=1),
        num_concepts=args.concepts,
        d_c=args.d_c,
    )
    with torch.device(args.device):
        sae, codebook = SparseAutoencoder(config.sae_config), QueryCodebook(config)
        z = torch.randn(1, args.tokens, args.d_in)
    with torch.no_grad():
        torch.nn.init.normal_(codebook.codebook, std=0.02)
        torch.nn.init.normal_(codebook.slot_queries, std=0.02)
        sae.b_enc.fill_(-torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - args.active / args.d_sae)))
    sae.W_dec = None  # neither path decodes
    return sae.requires_grad_(False), codebook, z.requires_grad_()


def dense_step(sae, codebook, z, mask, where):
    h = sae.encode(z) * mask[..., None]
    (h @ codebook.codebook).square().mean().backward()


def sparse_step(sae, codebook, z, mask, where):
    codebook.concept_tokens(sae, z, mask, where)[0].square().mean().backward()


def measure(args):
    """Seconds (median) and peak bytes of one path, and the mean number of active features."""
    sae, codebook, z = build(args)
    mask = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    kinds = torch.full(z.shape[:2], INSTRUCTION, device=z.device)
    where = token_position_features(kinds, z.new_zeros(*z.shape[:2], 2), z.new_zeros(z.shape[:2]))
    with torch.no_grad():
        active = float((sae.encode(z[:, :32]) > 0).sum(-1).float().mean())
    step = {"dense": dense_step, "sparse": sparse_step}[args.path]
    seconds, peak = [], 0
    for repeat in range(args.repeats + 1):
        z.grad = codebook.codebook.grad = None
        held = restart_peak(args.device)
        began = time.perf_counter()
        step(sae, codebook, z, mask, where)
        if z.is_cuda:
            torch.cuda.synchronize()
        if repeat:  # the first step warms up: threads start, code is read from disk
            seconds.append(time.perf_counter() - began)
            peak = max(peak, peak_memory(args.device) - held)
    gradients = sum(leaf.grad.nbytes for leaf in (z, codebook.codebook))
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
        print(f"{path:8}{measured[path]['seconds']:9.3f} s {measured[path]['peak'] / 2**20:9.0f} MiB")
    print(f"of both, gradients of codebook and hidden states: {sparse['gradients'] / 2**20:.0f} MiB")
    result = {
        "speedup": dense["seconds"] / sparse["seconds"],
        "memory_ratio": dense["peak"] / sparse["peak"],
        "dense_seconds": dense["seconds"],
        "sparse_seconds": sparse["seconds"],
        "dense_peak_mib": dense["peak"] / 2**20,
        "sparse_peak_mib": sparse["peak"] / 2**20,
        "gradients_mib": sparse["gradients"] / 2**20,
        "active_features": sparse["active"],
        "device": args.device,
        "threads": torch.get_num_threads(),
    }
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    main()
