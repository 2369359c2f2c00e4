"""The autoencoders that are exported for SAELens to load."""

import torch

from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig

D_IN, D_SAE = 8, 24
CASES = {"relu": {}, "topk": {"k": 5}, "batchtopk": {"k": 5}, "jumprelu": {}}


def build(activation):
    torch.manual_seed(1)
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=D_IN, d_sae=D_SAE, activation=activation, backbone="tiny/backbone", layer=13, **CASES[activation]
        )
    )
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
        if activation == "jumprelu":
            sae.threshold.uniform_(0.1, 1.0)
        elif activation == "batchtopk":
            sae.threshold.fill_(0.7)
        sae.mean_active_activation.uniform_(1, 3)
    return sae


def export(activation, folder):
    sae = build(activation)
    sae.save_saelens(folder)
    return sae
