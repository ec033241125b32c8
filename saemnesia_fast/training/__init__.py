"""Training sparse autoencoders on the activations of a diffusion model's UNet."""

from saemnesia_fast.training.collect import CollectConfig, collect_activations
from saemnesia_fast.training.config import TrainConfig
from saemnesia_fast.training.data import (
    ActivationSource,
    SeveralActivations,
    ShardActivations,
    TensorActivations,
)
from saemnesia_fast.training.evaluate import Evaluation, evaluate_fvu, evaluate_sae
from saemnesia_fast.training.live import LiveActivations
from saemnesia_fast.training.loss import LossOutput, sae_loss
from saemnesia_fast.training.parallel import connect
from saemnesia_fast.training.sampling import Sampling
from saemnesia_fast.training.trainer import Trainer, train_sae, train_saes

__all__ = [
    "ActivationSource",
    "CollectConfig",
    "Evaluation",
    "LiveActivations",
    "LossOutput",
    "Sampling",
    "SeveralActivations",
    "ShardActivations",
    "TensorActivations",
    "TrainConfig",
    "Trainer",
    "collect_activations",
    "connect",
    "evaluate_fvu",
    "evaluate_sae",
    "sae_loss",
    "train_sae",
    "train_saes",
]
