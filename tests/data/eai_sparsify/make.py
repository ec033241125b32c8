"""Writes the files of this folder with eai-sparsify; run it where that package is installed: `python make.py`."""

from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent

torch.manual_seed(0)
coder = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4))
with torch.no_grad():
    coder.encoder.bias.normal_(std=0.1)
    coder.b_dec.normal_(std=0.3)
coder.save_to_disk(HERE / "blocks.1")

x = torch.randn(32, 16)
with torch.no_grad():
    out = coder(x)
values, order = out.latent_acts.sort(dim=1, descending=True)
save_file(
    {"x": x, "x_hat": out.sae_out, "values": values, "indices": out.latent_indices.gather(1, order)},
    HERE / "forward.safetensors",
    {"eai-sparsify": version("eai-sparsify"), "torch": version("torch")},
)
