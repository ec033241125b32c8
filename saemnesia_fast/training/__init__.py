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
from saemnesia_fast.training.labelled import LabelledActivations, LabelledImages
from saemnesia_fast.training.live import LiveActivations
from saemnesia_fast.training.loss import LossOutput, sae_loss
from saemnesia_fast.training.parallel import connect
from saemnesia_fast.training.sampling import Sampling
from saemnesia_fast.training.supervised import SuperviseConfig, assignment_of, supervise_sae
from saemnesia_fast.training.supervised_loss import SupervisedLoss, Supervision
from saemnesia_fast.training.trainer import Trainer, train_sae, train_saes

__all__ = [
    "ActivationSource",
    "CollectConfig",
    "Evaluation",
    "LabelledActivations",
    "LabelledImages",
    "LiveActivations",
    "LossOutput",
    "Sampling",
    "SeveralActivations",
    "ShardActivations",
    "SuperviseConfig",
    "SupervisedLoss",
    "Supervision",
    "TensorActivations",
    "TrainConfig",
    "Trainer",
    "assignment_of",
    "collect_activations",
    "connect",
    "evaluate_fvu",
    "evaluate_sae",
    "sae_loss",
    "supervise_sae",
    "train_sae",
    "train_saes",
]
