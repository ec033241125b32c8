"""What an evaluation is made of: methods that erase, and a benchmark that paints and judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ..concepts import ConceptTable
    from ..erasure import Erasure
    from ..sae import TopKSAE


class Method(Protocol):
    """Something that erases concepts in a pipeline.

    Its fields of numbers, texts, SAEs and concept tables say what it does: an evaluation's units are known by them.
    """

    @property
    def name(self) -> str:
        """One word, as on the command line."""
        ...

    @property
    def source(self) -> str:
        """The paper or code that it comes from."""
        ...

    def erased(self, pipe: Any, concepts: Sequence[str]) -> AbstractContextManager[Mapping[str, Any]]:
        """While open, `pipe` erases the concepts; yields further keyword arguments for its calls.

        Weights that were swapped and hooks that were set are as before once it is closed, also after an exception.
        """
        ...


class Request(Protocol):
    """A picture to paint: the class index of every kind (`object`, `style`, ...), its prompt and its seed."""

    @property
    def prompt(self) -> str: ...

    @property
    def seed(self) -> int: ...


class Judgement(NamedTuple):
    """What a benchmark's classifiers see in n pictures."""

    probabilities: dict[str, Tensor]
    """{kind: [n, classes] float32}."""
    features: Tensor
    """[n, D] float32: the features of which FID is computed."""


class Benchmark(Protocol):
    """Prompts, seeds, a painter and a judge."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """{kind: the names of its classes}, the concepts that can be erased; two kinds, that of the shapes first."""
        ...

    @property
    def features(self) -> str:
        """What the judge's features are, for the report."""
        ...

    @property
    def pipe(self) -> Any:
        """The pipeline that paints, handed to a method before it does."""
        ...

    def described(self) -> Mapping[str, Any]:
        """All that the pictures and their judgement depend on, as JSON: steps, guidance, a hash of the weights, ..."""
        ...

    def requests(self, seed: int) -> Sequence[Any]:
        """The pictures that belong to a seed, each a `Request` with one class of every kind; no two seeds share one."""
        ...

    def paint(self, wanted: Sequence[Any], *, arguments: Mapping[str, Any] | None = None) -> Tensor:
        """[n, 3, H, W] float32 in [0, 1], the same whenever the same pictures are wanted.

        `arguments` go to the pipeline's calls, a text among them once for every prompt.
        """
        ...

    def judged(self, images: Tensor) -> Judgement: ...


@dataclass
class Setting:
    """How concepts of one kind are erased; the arguments of `apply_erasure`."""

    strength: dict[str, float]
    """Hook point -> gamma."""
    num_latents: int | None = None
    """The best so many of each step; the assigned latent, or the best one, if neither this nor percentile is given."""
    scale: str = "mean"
    mode: str = "exact"
    halves: str = "both"
    start: float = 0.0
    stop: float = 1.0
    percentile: float | None = None
    reselect: bool = False


@dataclass(frozen=True)
class NoErasure:
    """The pipeline as it is."""

    name: str = "none"
    source: str = "the unchanged pipeline"

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        yield {}


@dataclass(frozen=True)
class SparseErasure:
    """Steering of SAE latents (SPEC 3): SAeUron and SAEmnesia, by the SAEs, tables and settings that they are given.

    Kinds whose settings name the same hook point are erased there at once; they may differ in strength and num_latents.
    """

    name: str
    source: str
    saes: Mapping[str, TopKSAE]
    """{hook point: SAE}."""
    tables: Mapping[str, ConceptTable]
    """{hook point: table}; they also say of which kind a concept is."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """{kind: setting}."""
    stored: bool = False
    """Take strength, scale and number of latents of each concept from the tables, where `sweep` left the best."""

    @contextmanager
    def erased(self, pipe: Any, concepts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        with self.handles(pipe, concepts):
            yield {}

    @contextmanager
    def handles(self, pipe: Any, concepts: Sequence[str]) -> Iterator[list[Erasure]]:
        """Erases while open; yields the erasure of each hook point.

        Raises:
            ValueError: a concept has no kind, a kind no setting, or settings that share a hook point do not agree.
        """
        from ..erasure import apply_erasure

        with ExitStack() as stack:
            yield [
                stack.enter_context(apply_erasure(pipe, self.saes[point], self.tables[point], **options))
                for point, options in self._by_hook_point(concepts).items()
            ]

    def _by_hook_point(self, concepts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{hook point: the options of `apply_erasure`}, strength and num_latents as {concept: ...}."""
        kinds = {name: kind for t in self.tables.values() for name, kind in zip(t.concepts, t.kinds, strict=True)}
        at: dict[str, dict[str, Setting]] = {}
        for concept in concepts:
            if concept not in kinds:
                raise ValueError(f"concepts: expected some of {', '.join(kinds)}, got {concept!r}")
            setting = self.settings.get(kinds[concept])
            if setting is None:
                raise ValueError(f"settings: expected one for {concept!r}, of kind {kinds[concept]!r}")
            for point in setting.strength:
                at.setdefault(point, {})[concept] = setting
        return {point: self._options(point, settings) for point, settings in at.items()}

    def _options(self, point: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
        shared, *others = [replace(setting, strength={}, num_latents=None) for setting in settings.values()]
        if any(other != shared for other in others):
            raise ValueError(f"settings: expected kinds erased at {point} to differ in strength and num_latents alone")
        return asdict(shared) | {
            "concepts": list(settings),
            "strength": {concept: setting.strength[point] for concept, setting in settings.items()},
            "num_latents": {concept: setting.num_latents for concept, setting in settings.items()},
            **(self.tables[point].stored(settings, shared.mode, shared.halves) if self.stored else {}),
        }


@dataclass(frozen=True)
class ContrastErasure(SparseErasure):
    """Steering along what the prompt adds (mode "contrast"), towards the next concept that stays.

    In the table's order, whatever theirs, the anchor is the first one of their kind behind the last of the erased, and
    from the table's end on to its beginning, that is not erased.

    Raises:
        ValueError: `stored`, as the strengths in tables are of other modes.
    """

    def __post_init__(self) -> None:
        if self.stored:
            raise ValueError(f"strength: expected one for {self.name}, as those in tables are of other modes")

    def _options(self, point: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
        table, erased = self.tables[point], list(settings)
        last = max(map(table.concepts.index, erased))
        behind = [*range(last, len(table.concepts)), *range(last)]
        kept = (table.concepts[c] for c in behind if table.kinds[c] == table.kinds[last])
        anchor = next((name for name in kept if name not in erased), None)
        return super()._options(point, settings) | {"anchor": anchor}
