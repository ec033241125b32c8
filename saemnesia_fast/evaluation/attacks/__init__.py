"""Attacks: prompts in front of which free tokens are searched that bring an erased concept back (SPEC 5.4)."""

from .gradient import GradientAttack
from .run import Attack, attack_concept, summarize
from .search import SearchAttack
from .target import Finding, Target

__all__ = ["Attack", "Finding", "GradientAttack", "SearchAttack", "Target", "attack_concept", "summarize"]
