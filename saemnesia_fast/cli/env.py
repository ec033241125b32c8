"""`saemnesia-fast env`."""

from dataclasses import dataclass

from ..env import describe


@dataclass
class Env:
    """Show versions and which backend computes each op, and why."""

    def run(self) -> None:
        print(describe())
