"""Which latents fire, and which have not for so long that they count as dead (SPEC 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saemnesia_fast.training.layout import ALONE, Layout


class LatentActivity:
    """Firings of this process's n of N latents, counted on `device`.

    The dense work for dead latents needs to know how many there are, and the host must not ask in every step. But it
    can foresee: only a latent silent for all but the next few batches' tokens can be dead in one of them. So every
    `steps_ahead` steps it looks for those, `candidates`, and each step asks the device which of them are dead. Where
    there are any, this process's latents `with_candidates` [c] int64 are among them.
    """

    def __init__(
        self,
        num_latents: int,
        dead_after: int,
        device: torch.device | str,
        layout: Layout = ALONE,
        steps_ahead: int = 1,
        with_candidates: Tensor | None = None,
    ) -> None:
        self.num_latents = num_latents
        self.dead_after = dead_after
        self.steps_ahead = steps_ahead
        self.layout = layout
        self.with_candidates = with_candidates
        rows = layout.shard(num_latents)
        self.tokens_since_fired = torch.zeros(rows.stop - rows.start, dtype=torch.int64, device=device)
        self.firings = torch.zeros_like(self.tokens_since_fired)
        self._candidates: Tensor | None = None
        self._foreseen = 0

    def dead(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Before a step of so many tokens: `dead` [C] bool of `candidates` [C] int64, ascending; None for no C.

        Where other processes hold latents, None only if there is no C in any of them.
        """
        if self._foreseen < tokens:
            self._foreseen = self.steps_ahead * tokens
            possible = self.tokens_since_fired > self.dead_after - self._foreseen
            found = bool(self.layout.sum_over_latents(possible.sum()))
            if self.with_candidates is not None:
                possible[self.with_candidates] = True
            self._candidates = possible.nonzero().squeeze(1) if found else None
        self._foreseen -= tokens
        if self._candidates is None:
            return None
        return self.tokens_since_fired[self._candidates] >= self.dead_after, self._candidates

    def add(self, hits: Tensor, tokens: int, accepted: Tensor) -> None:
        """Count a step's `hits` [N] on so many tokens, if it is `accepted` (0-d bool)."""
        hits = hits * accepted
        self.firings += hits
        self.tokens_since_fired += accepted * tokens
        self.tokens_since_fired *= hits == 0

    def look_again(self) -> None:
        """Find the candidates anew in the next step, as a process does that continues from here."""
        self._foreseen = 0

    def report(self, tokens: int) -> dict[str, Any]:
        """After so many tokens: how many of all latents are dead or never fired, and how often the others fire."""
        counters = (self.tokens_since_fired, self.firings)
        since, firings = (self.layout.all_latents(counter, self.num_latents).cpu() for counter in counters)
        density = (firings[firings > 0].double() / max(tokens, 1)).log10()
        quantiles = {"0.1": 0.1, "0.5": 0.5, "0.9": 0.9}
        return {
            "num_latents": len(since),
            "dead": int((since >= self.dead_after).sum()),
            "dead_after": self.dead_after,
            "never_fired": int((firings == 0).sum()),
            "log10_firings_per_token": {
                name: round(float(density.quantile(q)), 3) for name, q in quantiles.items() if len(density)
            },
        }
