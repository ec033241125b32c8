"""Writes the files of this folder with SAELens and dictionary_learning; run it where both are: `python make.py`."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
D, N, K = 16, 64, 4

torch.manual_seed(0)
x = torch.randn(32, D)
forwards = {"x": x}


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


for name, options in {
    "saelens": {},
    "saelens_rescaled": {
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
    },
}.items():
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=N, k=K, **options))
    randomise(sae)
    sae.save_model(HERE / name)
    forwards[name] = sae(x).detach()

for kind in (AutoEncoderTopK, BatchTopKSAE):
    dictionary = kind(D, N, K)
    randomise(dictionary)
    folder = HERE / kind.__name__
    folder.mkdir(exist_ok=True)
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind.__name__, "k": K}}))
    options = {"use_threshold": False} if kind is BatchTopKSAE else {}
    forwards[kind.__name__] = torch.cat(
        [dictionary.decode(dictionary.encode(one[None], **options)) for one in x]
    ).detach()

packages = ("sae-lens", "dictionary-learning", "torch")
save_file(forwards, HERE / "forward.safetensors", {name: version(name) for name in packages})
