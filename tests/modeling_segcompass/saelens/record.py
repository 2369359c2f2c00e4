"""Record what SAELens computes, with the real package, for tests/modeling_segcompass/test_saelens.py.

    python -m venv saelens && saelens/bin/pip install sae-lens
    PYTHONPATH=. saelens/bin/python tests/modeling_segcompass/saelens/record.py

Writes beside itself `theirs-*`, SAEs that SAELens saved, and `ours-*`, SAEs that this project exported, each with
`recorded.safetensors`: inputs, activations and reconstructions as SAELens computes them.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.modeling_segcompass.saelens.ours import CASES, D_IN, D_SAE, export


def record(folder):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    z = torch.randn(12, D_IN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        acts = sae.encode(z)
        recorded = {"z": z, "feature_acts": acts, "reconstruction": sae.decode(acts)}
    save_file({name: value.contiguous() for name, value in recorded.items()}, folder / "recorded.safetensors")


def write_theirs(folder, architecture, **options):
    from sae_lens.saes import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    classes = {
        "standard": (StandardSAE, StandardSAEConfig),
        "topk": (TopKSAE, TopKSAEConfig),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    }
    sae_class, config_class = classes[architecture]
    torch.manual_seed(3)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if name.startswith("b_") else 0.6))
            if name == "threshold":
                parameter.abs_()
    sae.cfg.metadata.model_name = "tiny/backbone"
    sae.cfg.metadata.hook_name = "blocks.12.hook_resid_post"
    sae.save_model(folder)


def main(root):
    theirs = {
        "theirs-standard": ("standard", {"apply_b_dec_to_input": True}),
        "theirs-topk": ("topk", {"k": 5, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True}),
        "theirs-jumprelu": ("jumprelu", {"apply_b_dec_to_input": False}),
    }
    for name, (architecture, options) in theirs.items():
        write_theirs(root / name, architecture, **options)
        record(root / name)
    for name in CASES:
        export(name, root / f"ours-{name}")
        record(root / f"ours-{name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
