"""`saemnesia-fast attack`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import read_json, write_json
from .inputs import quiet_libraries
from .processes import in_processes

if TYPE_CHECKING:
    from ..evaluation import Benchmark, Method
    from ..evaluation.attacks import GradientAttack, SearchAttack


@dataclass(kw_only=True)
class AttackCommand:
    """Search prompts that bring erased concepts back: UA before and after (SPEC 5.4).

    Killed at any moment it goes on where it was: run the same command again.
    """

    minicanvas: bool = False
    """Attack on MiniCanvas, the benchmark that comes with the package; the only one so far."""
    methods: tuple[str, ...] = ("saeuron-exact",)
    """What erases, as for `evaluate`."""
    concepts: tuple[str, ...] = ()
    """Concepts that are erased, each by itself; all if not given."""
    attack: Literal["gradient", "search"] = "gradient"
    """gradient: descent through the erased UNet, in the manner of UnlearnDiffAtk; search: evolution by
    the judge's word alone."""
    space: Literal["vocabulary", "continuous"] = "vocabulary"
    """Of the gradient attack: tokens that a text can hold, or any embeddings, which is stronger."""
    tokens: int = 5
    """Free tokens before each prompt."""
    iterations: int = 60
    """Of the gradient attack, at most, for each prompt."""
    every: int = 10
    """Of the gradient attack: iterations from one picture to the next."""
    draws: int = 4
    """Of the gradient attack: timesteps and noises of an iteration."""
    population: int = 8
    """Of the search: pictures of a generation, for each prompt."""
    generations: int = 6
    """Of the search, at most."""
    seeds: tuple[int, ...] = (0,)
    """Each stands for prompts with noise of their own."""
    prompts: int | None = None
    """Prompts of each concept and seed; all if not given."""
    supervised: Path | None = None
    """Folder of SAEmnesia's SAEs and tables: settings.json, sae/POINT, concepts/POINT; the package's if not given."""
    out: Path = Path("attack")
    """Folder for attack.json and, in units/, what is done so far."""
    processes: int = 0
    """Processes that attack; as many as there are cores for `threads` if 0."""
    threads: int = 1
    """CPU threads of each process."""

    def run(self) -> None:
        if not self.minicanvas:
            raise ValueError("minicanvas: expected --minicanvas, the only data set that can be attacked so far")
        from ..env import environment
        from ..evaluation.attacks import summarize
        from ..evaluation.units import described
        from ..minicanvas.build import machine

        quiet_libraries()
        benchmark, methods, units = self.plan()
        if any(not path.exists() for *_, path in units):
            in_processes(self.work, self.processes, self.threads)
        found = [read_json(path) for *_, path in units]
        summary = {
            "attack": described(self.chosen()),
            "benchmark": {"name": benchmark.name, **benchmark.described()},
            "methods": {method.name: described(method) for method in methods},
            "UA": summarize(found),
            "units": found,
            "machine": machine(),
            "versions": environment(),
        }
        write_json(self.out / "attack.json", summary)
        print_table(summary["UA"])
        print(f"\n{self.out / 'attack.json'}")

    def chosen(self) -> GradientAttack | SearchAttack:
        """The attack with its budget."""
        from ..evaluation.attacks import GradientAttack, SearchAttack

        if self.attack == "search":
            return SearchAttack(self.tokens, self.population, self.generations)
        return GradientAttack(self.tokens, self.space, self.iterations, self.every, self.draws)

    def plan(self) -> tuple[Benchmark, list[Method], list[tuple[Method, str, int, Path]]]:
        """(benchmark, methods, units): what erases what, the seed, and the file, named by all that it depends on."""
        from ..evaluation.units import described, made_with
        from ..minicanvas.canvas import MiniCanvas, kind_of
        from ..minicanvas.methods import SUPERVISED, methods

        concepts = self.concepts or tuple(name for names in MiniCanvas.classes.values() for name in names)
        for concept in concepts:
            kind_of(concept)
        canvas = MiniCanvas.load()
        chosen = methods(self.methods, canvas, self.supervised or SUPERVISED, self.out / "weights")
        programs = made_with(canvas.pipe.device)
        shared = [programs, canvas.described(), described(self.chosen()), self.prompts, self.threads]
        units = []
        for method in chosen:
            depends = json.dumps([*shared, described(method)], sort_keys=True)
            digest = hashlib.sha256(depends.encode()).hexdigest()[:16]
            folder = self.out / "units" / method.name
            units += [
                (method, concept, seed, folder / f"{concept.replace(' ', '_')}.{seed}.{digest}.json")
                for concept in concepts
                for seed in self.seeds
            ]
        return canvas, chosen, units

    def work(self, part: tuple[int, int]) -> None:
        """Attack part i of n of the units that are missing, on `threads` threads."""
        import torch
        from tqdm import tqdm

        from ..evaluation.attacks import attack_concept

        quiet_libraries()
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            benchmark, _, units = self.plan()
            mine = [unit for unit in units[part[0] :: part[1]] if not unit[-1].exists()]
            for method, concept, seed, path in tqdm(mine, unit="concept", position=part[0]):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, attack_concept(benchmark, method, concept, self.chosen(), seed, self.prompts))
        finally:
            torch.set_num_threads(before)


def print_table(UA: Mapping[str, Any]) -> None:
    """UA of each method and concept, without and with the attack."""
    for method, groups in UA.items():
        rows = dict(groups["concepts"]) | {
            f"all of {kind}": {share: one["mean"] for share, one in group.items()}
            for kind, group in groups.items()
            if kind != "concepts"
        }
        print(f"\n{method:<28}UA before    after")
        for name, row in rows.items():
            print(f"{name:<28}{row['before']:>9.1f}{row['after']:>9.1f}")
