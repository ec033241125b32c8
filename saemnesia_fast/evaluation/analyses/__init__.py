"""What the papers show of an SAE's latents and concepts, as numbers and plots: `saemnesia-fast analyse`."""

from .maps import analyse_maps, one_of_each
from .reading import Analysis, Reading
from .scores import analyse_scores, score_profile
from .separability import analyse_separability, distances, separability
from .timesteps import analyse_timesteps
from .watching import Sample, Watched, watch

__all__ = [
    "Analysis",
    "Reading",
    "Sample",
    "Watched",
    "analyse_maps",
    "analyse_scores",
    "analyse_separability",
    "analyse_timesteps",
    "distances",
    "one_of_each",
    "score_profile",
    "separability",
    "watch",
]
