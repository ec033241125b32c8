"""Who takes part in train_step: plain PyTorch, other people's trainers through their own classes, and ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from activations import Weights
from harness import Absent, Case
from providers import HALF_TOLERANCE, load_peer
from saemnesia_fast import ops
from train_step_dense import ALPHA, DEAD_AFTER, Plain, Setting, first_counts, released_loss

LOSS_LIMIT = 1e-4
BAND, HALF_BAND = 1e-4, 2e-3
"""Two activations that differ by less, relatively, may change places in float32, in 16 bits."""
STEPS = 1_000_000
STEPS_A_LOG = 10
PHASES = ("encode", "loss", "gradients", "update")
"""Of our steps, see `marked`."""
STATE_BYTES = 12
"""Of a float32 weight and its moments."""
BESIDE_STATE_BYTES = 16
"""For each weight at most: the ones it starts from, its gradient, and temporaries of the update."""
PRE_ACTIVATION_BYTES = 16
"""For each of the [M, N] at most, where they are held."""


class Step(Protocol):
    weights: Weights
    """The present ones, [N, d], [N], [d], [N, d]."""

    def __call__(self, x: Tensor) -> Tensor | float:
        """One step on tokens x [M, d]; the loss before it."""


@dataclass(frozen=True)
class Peer:
    """One competitor."""

    start: Callable[[Weights, Setting], Step]
    """Takes the weights over."""
    package: str = ""
    """Whose version is told."""
    formula: str = "topk"
    """Which loss it is held to."""
    differs: str = ""
    """Where its recipe is another, how: its new weights are not checked then, its loss is."""
    loss_limit: float = LOSS_LIMIT
    band: float = BAND
    state_bytes: int = STATE_BYTES
    """Of a weight and its moments."""
    pre_activation_bytes: int = PRE_ACTIVATION_BYTES

    def bytes_needed(self, case: Case) -> int:
        """At most, to be checked and timed."""
        of_weights = (self.state_bytes + BESIDE_STATE_BYTES) * 2 * case.N * case.d
        return of_weights + self.pre_activation_bytes * case.M * case.N


class Sparsify:
    """eai-sparsify's trainer, its optimizer "adam", in a step of its "fvu" loss."""

    def __init__(self, own: Weights, setting: Setting) -> None:
        if own.W_enc.device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        module, config = load_peer("sparsify.sparse_coder"), load_peer("sparsify.config")
        num_latents, d = own.W_enc.shape
        cfg = config.SparseCoderConfig(num_latents=num_latents, k=setting.k)
        self.coder = module.SparseCoder(d, cfg, own.W_enc.device, torch.float32)
        coder = self.coder
        self.weights = Weights(coder.encoder.weight, coder.encoder.bias, coder.b_dec, coder.W_dec)
        _assign(self.weights, own)
        self.optimizer = torch.optim.Adam(coder.parameters(), lr=setting.lr)
        self.since = first_counts(own, setting.dead)
        self.fired = torch.zeros_like(self.since, dtype=torch.bool)

    def __call__(self, x: Tensor) -> float:
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        dead = self.since > DEAD_AFTER
        out = coder(x=x, y=x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        read = float(out.fvu.detach()) + ALPHA * float(out.auxk_loss.detach())
        (out.fvu + ALPHA * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since += len(x)
        self.since[self.fired] = 0
        self.fired.zero_()
        return read


class DictionaryLearning:
    """dictionary-learning's TopKTrainer."""

    def __init__(self, own: Weights, setting: Setting) -> None:
        module = load_peer("dictionary_learning.trainers.top_k")
        num_latents, d = own.W_enc.shape
        self.trainer = module.TopKTrainer(
            steps=STEPS,
            activation_dim=d,
            dict_size=num_latents,
            k=setting.k,
            layer=0,
            lm_name="",
            lr=setting.lr,
            auxk_alpha=ALPHA,
            warmup_steps=0,
            device=str(own.W_enc.device),
        )
        ae = self.trainer.ae
        _assign(Weights(ae.encoder.weight, ae.encoder.bias, ae.b_dec, ae.decoder.weight), own, transposed=True)
        self.trainer.num_tokens_since_fired = first_counts(own, setting.dead)

    @property
    def weights(self) -> Weights:
        ae = self.trainer.ae
        return Weights(ae.encoder.weight, ae.encoder.bias, ae.b_dec, ae.decoder.weight.T)

    def __call__(self, x: Tensor) -> float:
        # In step 0 it would set b_dec; from step 1000 on it also keeps a threshold, as most of its steps do.
        return self.trainer.update(2000, x)


class Ours:
    """`saemnesia_fast.training.Trainer`, which reads its metrics every tenth step."""

    def __init__(
        self, own: Weights, setting: Setting, backend: str, needed: str, moments: str = "float32", **more: Any
    ) -> None:
        from saemnesia_fast.sae import SAEConfig, TopKSAE
        from saemnesia_fast.training import TrainConfig, Trainer

        device = own.W_enc.device
        self.backend = backend
        with ops.use_backend(backend):
            _check_backend(str(device.type), needed)
            num_latents, d = own.W_enc.shape
            sae = TopKSAE(SAEConfig(d_in=d, num_latents=num_latents, k=setting.k), device=device)
            self.weights = Weights(sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec)
            _assign(self.weights, own)
            config = TrainConfig(
                k=setting.k,
                steps=STEPS,
                lr=setting.lr,
                dead_after=DEAD_AFTER,
                moments=moments,
                device=str(device),
                progress=False,
                **more,
            )
            self.trainer = Trainer(config, (), sae)
        self.trainer.activity.tokens_since_fired.copy_(first_counts(own, setting.dead))
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor | float:
        with ops.use_backend(self.backend):
            metrics = self.trainer.train_step(x)
            self.steps += 1
            if self.steps % STEPS_A_LOG == 0:
                self.trainer.check()
                return metrics.loss.item()
        return metrics.loss


def _check_backend(device: str, needed: str) -> None:
    """Absent unless `needed` computes the gradients."""
    choice = next(choice for choice in ops.backend_report(device) if choice.op == "sparse_gradients")
    if choice.backend != needed:
        raise Absent(choice.why.partition(f"cannot run on {device}: ")[2] or choice.why)


def _assign(parameters: Weights, own: Weights, transposed: bool = False) -> None:
    """Fill a module's parameters; `transposed`: its W_dec is [d, N]."""
    if transposed:
        own = own._replace(W_dec=own.W_dec.T)
    with torch.no_grad():
        for parameter, tensor in zip(parameters, own, strict=True):
            parameter.copy_(tensor)


def released(own: Weights, setting: Setting) -> Plain:
    return Plain(own, setting, released_loss, reads_loss=True)


BASELINE = "dense eager"
OURS = {"cpu": {"ours eager": "eager", "ours cpu": "cpu"}, "cuda": {"ours eager": "eager", "ours cuda": "auto"}}
"""{device: {name: backend}}. On a GPU encoding is the Triton backend's."""


def peers(device: str) -> dict[str, Peer]:
    """Everyone, by name."""
    half_on_a_gpu = {"loss_limit": HALF_TOLERANCE} if device == "cuda" else {}
    entered = {
        BASELINE: Peer(Plain),
        "torch.compile": Peer(partial(Plain, compiled=True)),
        "eai-sparsify": Peer(
            Sparsify, "eai-sparsify", differs="no clipping, Adam eps 1e-8, no AuxK at the encoder", **half_on_a_gpu
        ),
        "dictionary-learning": Peer(
            DictionaryLearning,
            "dictionary-learning",
            formula="dictionary-learning",
            differs="squared error a token, AuxK over the residual's variance, Adam eps 1e-8",
        ),
        "SAeUron": Peer(released, formula="released", differs="BatchTopK, AuxK as released"),
    }
    for name, backend in OURS[device].items():
        start = partial(Ours, backend=backend, needed=name.removeprefix("ours "))
        entered[name] = Peer(start, pre_activation_bytes=0)
    ours = partial(Ours, backend=OURS[device][f"ours {device}"], needed=device)
    entered[f"ours {device}, float16 products"] = Peer(
        partial(ours, compute_dtype="float16"),
        loss_limit=HALF_TOLERANCE,
        band=HALF_BAND,
        state_bytes=13,
        pre_activation_bytes=0,
    )
    entered[f"ours {device}, bfloat16 moments"] = Peer(
        partial(ours, moments="bfloat16"),
        differs="moments rounded to bfloat16",
        state_bytes=8,
        pre_activation_bytes=0,
    )
    entered[f"ours {device}, 8bit moments"] = Peer(
        partial(ours, moments="8bit", adam_eps=1e-6),
        differs="moments rounded to 8 bits, Adam eps 1e-6",
        state_bytes=6,
        pre_activation_bytes=0,
    )
    return entered


def package_version(peer: Peer) -> str:
    """Of the peer's package, where it is one and is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(peer.package) if peer.package else ""
    except PackageNotFoundError:
        return ""


@contextmanager
def marked(step: Step, mark: Callable[[], None]) -> Iterator[None]:
    """Our steps call `mark` between two of their `PHASES`, other people's never. AuxK belongs to the loss."""
    if not isinstance(step, Ours):
        yield
        return
    from saemnesia_fast.training import step as module

    adam = step.trainer._adam
    encode, collect = module.encode, adam.collect

    def encoded(*given: Any) -> Any:
        found = encode(*given)
        mark()
        return found

    def collected(*given: Any) -> Any:
        mark()
        found = collect(*given)
        mark()
        return found

    with patch.object(module, "encode", encoded), patch.object(adam, "collect", collected):
        yield
