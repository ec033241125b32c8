"""Files of other projects, read without running what is in them and written as ours (SPEC 6.2, 6.4)."""

from .latents import concept_table
from .sae import read_sae
from .unpickle import read_legacy
from .weights import convert_pipeline, read_state_dict

__all__ = ["concept_table", "convert_pipeline", "read_legacy", "read_sae", "read_state_dict"]
