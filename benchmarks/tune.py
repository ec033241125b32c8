"""tune: the fastest tiles of the Triton products on this GPU, written where the backend looks for them.

A candidate's answer is checked before it is timed; one that does not compile or does not fit is a line of the output.
Tiles are judged by all cases together, as a token's bits must not depend on the batch it comes in; and the depth is one
for all three products, that at which their best times multiply to the least.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from activations import tokens, weights
from harness import Case, Clock, Contest, Provider, attempt
from results import Row, Stamp, table
from saemnesia_fast import ops
from saemnesia_fast.ops import triton_product
from saemnesia_fast.ops.triton_tiles import CONFIGS, Tile, Tiles

OPERANDS = ("float16", "float32", "bfloat16")
CASES = {
    "encode_topk": (Case("encode_topk", M=512), Case("encode_topk", M=4096)),
    "probe": (Case("probe", M=512, flagged=0), Case("probe", M=4096, flagged=0)),
    "rank": (Case("probe", M=512, flagged=64), Case("probe", M=4096, flagged=512)),
}
"""What each product is timed by. Without a flagged token the probe is all there is, with many the rank outweighs it."""

# tokens, latents, depth, warps, stages; without those that spill registers on sm_90.
CANDIDATES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "float16": {
        "encode_topk": (
            (128, 128, 64, 8, 4),
            (128, 128, 64, 4, 3),
            (128, 256, 64, 8, 3),
            (128, 256, 64, 8, 4),
            (256, 128, 64, 8, 3),
            (64, 128, 64, 4, 4),
            (64, 256, 64, 4, 3),
            (128, 128, 32, 8, 4),
            (128, 256, 32, 8, 4),
            (128, 128, 128, 8, 2),
        ),
        "probe": ((64, 16, 64, 4, 3), (64, 16, 64, 8, 4), (64, 16, 32, 4, 6), (64, 16, 32, 8, 6), (64, 16, 128, 4, 4)),
        "rank": (
            (128, 128, 64, 8, 3),
            (128, 256, 64, 8, 3),
            (64, 64, 64, 4, 4),
            (64, 128, 64, 4, 4),
            (128, 128, 32, 8, 4),
            (128, 128, 128, 8, 2),
        ),
    },
    "float32": {
        "encode_topk": (
            (64, 128, 32, 4, 3),
            (128, 64, 32, 4, 3),
            (128, 64, 32, 8, 3),
            (128, 128, 32, 8, 3),
            (64, 64, 64, 4, 2),
            (128, 64, 64, 8, 2),
        ),
        "probe": ((64, 16, 32, 4, 5), (64, 16, 32, 8, 4), (64, 16, 64, 4, 3)),
        "rank": ((64, 128, 32, 4, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (64, 64, 64, 4, 2)),
    },
}


def config_path() -> Path:
    """Where the backend looks for what was measured on this GPU."""
    return CONFIGS / f"{torch.cuda.get_device_name().replace(' ', '_')}.json"


@contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """Every product of this process is cut like this."""
    before = triton_product.tiles_for
    triton_product.tiles_for = lambda device, operand: tiles
    try:
        yield
    finally:
        triton_product.tiles_for = before


def label(tile: Tile) -> str:
    return f"ours {tile.tokens}x{tile.latents}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"


def contest(product: str, case: Case, base: Tiles, tiles: Sequence[Tile]) -> Contest:
    """The op's own contest between cuts of one of its products, the first of them the baseline."""
    whole = import_module(case.op).contest(case, "cuda")
    ours = next(provider for provider in whole.providers if provider.name == "ours triton")

    @contextmanager
    def cut(tile: Tile) -> Iterator[None]:
        with ours.context(), using(base._replace(**{product: tile})):
            yield

    def entered(tile: Tile) -> Provider:
        context: partial[AbstractContextManager[Any]] = partial(cut, tile)
        return replace(ours, name=label(tile), context=context)

    shown = replace(case, op="tune", variant=f"{product} by {case.op}")
    return replace(whole, case=shown, providers=[entered(tile) for tile in tiles], baseline=label(tiles[0]))


def scores(rows: Sequence[Row], tiles: Sequence[Tile], cases: int) -> dict[Tile, float]:
    """The geometric mean of each tile's times over all cases; a tile that missed one has no score."""
    taken = {tile: [row.p50_us for row in rows if row.provider == label(tile) and row.p50_us] for tile in tiles}
    return {tile: math.prod(times) ** (1 / cases) for tile, times in taken.items() if len(times) == cases}


def choose(measured: Mapping[str, Mapping[Tile, float]]) -> Tiles | None:
    """The best tiles of one depth, of equal ones the first; None where no depth has a tile for every product."""
    found: list[tuple[float, Tiles]] = []
    for depth in dict.fromkeys(tile.depth for times in measured.values() for tile in times):
        of_depth = {
            name: {tile: time for tile, time in times.items() if tile.depth == depth}
            for name, times in measured.items()
        }
        if all(of_depth.values()):
            best = {name: min(times, key=times.__getitem__) for name, times in of_depth.items()}
            found.append((math.prod(of_depth[name][tile] for name, tile in best.items()), Tiles(**best)))
    return min(found, key=lambda one: one[0])[1] if found else None


def measure(
    operand: str, base: Tiles, candidates: Mapping[str, Sequence[Tile]], clock: Clock, seconds: float, stamp: Stamp
) -> tuple[dict[str, dict[Tile, float]], list[Row]]:
    """The scores of all candidates and of what is used without tuning, and a row for each at each case."""
    measured: dict[str, dict[Tile, float]] = {}
    rows: list[Row] = []
    for product, cases in CASES.items():
        tiles = list(dict.fromkeys([getattr(base, product), *candidates.get(product, ())]))
        own: list[Row] = []
        for case in (replace(case, dtype=operand) for case in cases):
            with torch.no_grad():
                own += attempt(partial(contest, product, case, base, tiles), case, clock, seconds, 0.0, stamp)
        print(f"\n{table(own)}", flush=True)
        measured[product] = scores(own, tiles, len(cases))
        rows += own
    return measured, rows


def write(path: Path, operand: str, tiles: Tiles, stamp: Stamp) -> None:
    """Add the tiles of one operand to the file, or replace them."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config |= {operand: tiles._asdict(), "measured": asdict(stamp)}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in config.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    unfinished.replace(path)


def agree(case: Case, device: str = "cuda") -> bool:
    """Whether all products give equal bits, which the kernels take for granted: what is kept is what is steered."""
    own, x = weights(case.d, case.N, case.torch_dtype, device), tokens(case, device)
    entries = torch.arange(0, case.N, 40, device=device)
    values, indices = ops.encode_topk(x, *own[:3], case.k)
    seen, steered = ops.probe(x, *own[:3], case.k, entries, torch.zeros(len(entries), device=device))
    kept = x.new_zeros(case.M, case.N).scatter(1, indices.long(), values)[:, entries]
    return torch.equal(torch.where(kept > 0, seen, 0), kept) and torch.equal(steered, kept > 0)


def sound(tiles: Tiles, operand: str) -> bool:
    with ops.use_backend("triton"), using(tiles):
        return agree(Case("tune", M=512, dtype=operand))


def tune(path: Path, clock: Clock, seconds: float, stamp: Stamp) -> Iterator[tuple[str, Tiles | None, list[Row]]]:
    """Each operand dtype, its tiles, which are in the file by then, and all rows. bfloat16, of float16's size and rate,
    tries its choice."""
    chosen: dict[str, Tiles] = {}
    for operand in OPERANDS:
        if operand in CANDIDATES:
            candidates = {name: [Tile(*shape) for shape in shapes] for name, shapes in CANDIDATES[operand].items()}
        else:
            candidates = {name: [getattr(chosen["float16"], name)] for name in CASES if "float16" in chosen}
        base = triton_product.tiles_for(torch.device("cuda"), getattr(torch, operand))
        measured, rows = measure(operand, base, candidates, clock, seconds, stamp)
        tiles = choose(measured)
        if tiles is not None and sound(tiles, operand):
            chosen[operand] = tiles
            write(path, operand, tiles, stamp)
            print(f"\n{operand}: {tiles}", flush=True)
        else:
            print(
                f"\n{operand}: nothing chosen, as {'bits differ' if tiles else 'no tiles ran everywhere'}", flush=True
            )
        yield operand, chosen.get(operand), rows
