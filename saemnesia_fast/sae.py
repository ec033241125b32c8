"""The TopK sparse autoencoder (SPEC 1) and its files (SPEC 6.1)."""

import dataclasses
import hashlib
import math
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .files import load_tensors, read_json, resolve_folder, save_tensors, write_json
from .ops import SparseLatents

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"
UNIT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class SAEConfig:
    """What `cfg.json` holds, under the names of sparsify, SAeUron and SAEmnesia (SPEC 6.1)."""

    d_in: int
    """d, the number of channels of a token."""
    k: int = 32
    """Latents kept per token."""
    num_latents: int = 0
    """N; 0 means expansion_factor * d_in."""
    expansion_factor: int = 32
    """N / d where num_latents is 0."""
    normalize_decoder: bool = True
    """Whether training keeps the rows of W_dec at unit norm."""
    activation: str = "topk"
    """Only "topk" is known here."""
    multi_topk: bool = False
    """Whether training added the loss at 4k."""
    batch_topk: bool = False
    """Whether training shared the budget over the batch; serving keeps the k largest of each token all the same."""
    sample_topk: bool = False
    """Whether training shared the budget over a sample; serving as above."""
    input_unit_norm: bool = False
    """Whether tokens are standardised by their own mean and standard deviation before encoding (SPEC 1.4)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the file that are not known here, written back unchanged."""

    def __post_init__(self) -> None:
        for name in ("d_in", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.k > self.resolved_num_latents:
            raise ValueError(f"k: expected 1 <= k <= N = {self.resolved_num_latents}, got {self.k}")
        if self.activation != "topk":
            raise ValueError(f"activation: expected 'topk', got {self.activation!r}")
        for name in ("skip_connection", "transcode"):
            if self.extra.get(name):
                raise ValueError(f"{name}: expected false, as only plain autoencoders are known here, got true")

    @property
    def resolved_num_latents(self) -> int:
        """N, also where `num_latents` is 0."""
        return self.num_latents or self.expansion_factor * self.d_in

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "SAEConfig":
        """Read the entries of a `cfg.json`; unknown keys go to `extra`."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        if "d_in" not in entries:
            raise ValueError(f"d_in: missing among the entries {sorted(entries)}")
        extra = {key: value for key, value in entries.items() if key not in known}
        return cls(**{key: value for key, value in entries.items() if key in known}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `cfg.json`."""
        entries = dataclasses.asdict(self)
        return entries | entries.pop("extra")

    def replace(self, **changes: Any) -> "SAEConfig":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)


class SAEOutput(NamedTuple):
    """What `TopKSAE.forward` returns."""

    x_hat: Tensor
    """[..., d], the reconstruction, on the scale of the input."""
    latents: SparseLatents
    """values and indices [..., k]."""


def unit_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation plus 1e-5 of each token [..., d], as [..., 1] in the compute dtype (SPEC 1.4).

    The standard deviation is the unbiased one (d - 1), as in the released code. `(x - mean) / std` is what an SAE with
    `input_unit_norm` sees; x_hat * std + mean and Delta * std go back.
    """
    tokens = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    std, mean = torch.std_mean(tokens, dim=-1, keepdim=True)
    return mean, std + UNIT_NORM_EPS


class TopKSAE(nn.Module):
    """Sparse autoencoder with N latents, of which each token keeps the k largest (SPEC 1).

    Parameters, under the names of SPEC 6.1: `encoder` (weight [N, d], bias [N]), `W_dec` [N, d] whose row i is
    latent i's direction, `b_dec` [d]. They start as zeros: use `TopKSAE.init` or `TopKSAE.from_pretrained`.
    """

    def __init__(
        self, cfg: SAEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        d, num_latents = cfg.d_in, cfg.resolved_num_latents
        self.encoder = nn.utils.skip_init(nn.Linear, d, num_latents, device=device or "cpu", dtype=dtype)
        nn.init.zeros_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)
        self.W_dec = nn.Parameter(torch.zeros(num_latents, d, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, device=device, dtype=dtype))

    @classmethod
    def init(
        cls,
        d: int,
        num_latents: int,
        k: int,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "TopKSAE":
        """A new SAE to train (SPEC 1.5): encoder kaiming-uniform, W_dec its copy with unit-norm rows, biases 0.

        `b_dec` is the trainer's to set, from its first batch. The weights depend on `seed`, d and N only, not on the
        device. `options` are fields of `SAEConfig`.
        """
        sae = cls(SAEConfig(d_in=d, num_latents=num_latents, k=k, **options))
        nn.init.kaiming_uniform_(sae.encoder.weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            sae.W_dec.copy_(nn.functional.normalize(sae.encoder.weight, dim=1))
        return sae.to(device=device, dtype=dtype)

    @property
    def W_enc(self) -> Tensor:
        """[N, d]."""
        return self.encoder.weight

    @property
    def b_enc(self) -> Tensor:
        """[N]."""
        return self.encoder.bias

    @property
    def d(self) -> int:
        """Channels of a token."""
        return self.cfg.d_in

    @property
    def num_latents(self) -> int:
        """N."""
        return self.cfg.resolved_num_latents

    @property
    def k(self) -> int:
        """Latents kept per token."""
        return self.cfg.k

    def encode(self, x: Tensor, precision: str = "default") -> SparseLatents:
        """The k largest latents of each token of x [..., d]; per token whatever the SAE was trained with (SPEC 1.4).

        precision: "default" or "exact", see `saemnesia_fast.ops`.
        """
        if self.cfg.input_unit_norm:
            mean, std = unit_norm_statistics(x)
            latents = self._encode((x - mean) / std, precision)
            return SparseLatents(latents.values.to(x.dtype), latents.indices)
        return self._encode(x, precision)

    def _encode(self, x: Tensor, precision: str = "default") -> SparseLatents:
        return ops.encode_topk(x, self.W_enc, self.b_enc, self.b_dec, self.k, precision)

    def decode(self, latents: SparseLatents) -> Tensor:
        """`x_hat` [..., d] (SPEC 1.3); of standardised tokens where `input_unit_norm`, which `forward` maps back."""
        return ops.decode(latents.values, latents.indices, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode x [..., d]."""
        if not self.cfg.input_unit_norm:
            latents = self._encode(x)
            return SAEOutput(self.decode(latents), latents)
        mean, std = unit_norm_statistics(x)
        latents = self._encode((x - mean) / std)
        x_hat = self.decode(latents) * std + mean
        return SAEOutput(x_hat.to(x.dtype), SparseLatents(latents.values.to(x.dtype), latents.indices))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TopKSAE":
        """Load `cfg.json` and `sae.safetensors` from a folder or a Hugging Face Hub repository (SPEC 6.1).

        `subfolder` is the hook point in a repository of several. `dtype` defaults to the file's. Raises
        FileNotFoundError when files are missing, ValueError when they do not describe a plain TopK autoencoder.
        """
        folder = resolve_folder(path_or_repo, subfolder, revision, (CONFIG_NAME, WEIGHTS_NAME))
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                others = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
                hint = f"; it has the subfolders {', '.join(others)}" if others else ""
                raise FileNotFoundError(f"{folder}: no {name}{hint}")
        entries = read_json(folder / CONFIG_NAME)
        tensors = load_tensors(folder / WEIGHTS_NAME)
        try:
            cfg = SAEConfig.from_dict(entries)
            _check_weights(tensors, cfg)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        sae = cls(cfg, device=device, dtype=dtype or tensors["W_dec"].dtype)
        sae.load_state_dict(tensors)
        return sae.requires_grad_(False)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `cfg.json` and `sae.safetensors` into `directory`, each atomically, weights in their present dtype."""
        save_tensors(os.path.join(directory, WEIGHTS_NAME), self.state_dict())
        write_json(os.path.join(directory, CONFIG_NAME), self.cfg.to_dict())

    def content_hash(self) -> str:
        """sha256 over what decides the latents' meaning: the weights rounded to float16, k and `input_unit_norm`.

        Concept tables are bound to it (SPEC 6.3). The rounding makes a float32 SAE and its float16 file equal.
        """
        digest = hashlib.sha256(f"k={self.k} input_unit_norm={self.cfg.input_unit_norm}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f" {name}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _check_weights(tensors: dict[str, Tensor], cfg: SAEConfig) -> None:
    d, num_latents = cfg.d_in, cfg.resolved_num_latents
    expected = {
        "encoder.weight": ("[N, d]", [num_latents, d]),
        "encoder.bias": ("[N]", [num_latents]),
        "W_dec": ("[N, d]", [num_latents, d]),
        "b_dec": ("[d]", [d]),
    }
    if tensors.keys() != expected.keys():
        raise ValueError(f"expected the tensors {sorted(expected)}, got {sorted(tensors)}")
    for name, (symbols, shape) in expected.items():
        if list(tensors[name].shape) != shape:
            raise ValueError(
                f"{name}: expected {symbols} = {shape} to match {CONFIG_NAME}, got {list(tensors[name].shape)}"
            )
