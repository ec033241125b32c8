"""What SAE erasure is compared with: other ways to erase a concept, as `Method`s on any Stable Diffusion pipeline."""

from .esd import ESD
from .negative_prompt import NegativePrompt
from .neuron_masking import NeuronMasking
from .uce import UCE

__all__ = ["ESD", "UCE", "NegativePrompt", "NeuronMasking"]
