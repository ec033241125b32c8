"""Renders the pages' figures from committed results: `python benchmarks/render.py` rewrites them in place.

A figure stands between `<!-- NAME -->` and `<!-- /NAME -->`; nobody types one by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EVALUATION = RESULTS / "minicanvas.json"
SEQUENCE = RESULTS / "minicanvas_sequence.json"
PAIRS = RESULTS / "minicanvas_pairs.json"
TRIALS = RESULTS / "minicanvas_trials.json"
SEARCHES = [RESULTS / f"sweep_{method}.json" for method in ("saemnesia", "saeuron")]
ATTACKS = {name: RESULTS / f"attack_{name}.json" for name in ("vocabulary", "continuous", "search")}
LATENTS, SEPARABILITY = (RESULTS / f"analyse_{what}.json" for what in ("scores", "separability"))
KINDS = ("object", "style")
SCORES = ("UA", "IRA", "CRA", "debris")
DEMO = RESULTS / "demo.json"
DEMO_BACKENDS = RESULTS / "demo_backends.json"
OPS = RESULTS / "ops.csv"
TRAIN_STEP = RESULTS / "train_step.csv"
MINICANVAS_SAE = RESULTS / "minicanvas_sae.json"
SUPERVISED_STEP = RESULTS / "supervised_step.json"
PLOT = RESULTS / "ops.png"
BUDGETS = ROOT / "tests" / "budgets.json"
NOT_YET = "Not measured yet."
RECORD = ROOT / "saemnesia_fast" / "minicanvas" / "weights" / "record.json"


def erasure_table(methods: Sequence[str] | None = None) -> str:
    """Mean scores of every concept of MiniCanvas, each erased alone, by the methods given or all."""
    report = _read(EVALUATION)
    lines = ["| erased, one at a time | by | UA | IRA | CRA | debris | FID |", "|---|---|---|---|---|---|---|"]
    for kind in KINDS:
        for method, groups in report["protocols"]["single"].items():
            if methods is None or method in methods:
                group = groups[kind]
                fid = f"{group['fid']:.2f}"
                lines.append(f"| {len(group['cases'])} {kind}s | {method} | {_scores(group, SCORES)} | {fid} |")
    return "\n".join([*lines, "", _means_over_seeds(report)])


def erasure_methods() -> str:
    """The same for the README: the papers' SAEs beside the strongest of the others."""
    return erasure_table(("none", "saeuron-exact", "saemnesia-exact", "saemnesia-contrast", "uce"))


def settings_table() -> str:
    """With what the methods that read an SAE erased."""
    lines = [
        "| of | by | strength | hook points | latents at each | scale | guidance halves |",
        "|---" * 7 + "|",
    ]
    for kind in KINDS:
        for one in _read(EVALUATION)["methods"]:
            if "saes" not in one["settings"]:
                continue
            setting = one["settings"]["settings"][kind]
            if one["settings"]["stored"] or setting["reselect"]:
                continue
            (strength,) = set(setting["strength"].values())
            steered = (setting["scale"], setting["halves"]) if setting["mode"] in ("exact", "released") else ("", "")
            cells = (
                "" if setting["mode"] == "replace" else f"{strength:g}",
                ", ".join(f"`{point}`" for point in setting["strength"]),
                setting["num_latents"] or "1, assigned",
                *steered,
            )
            lines.append(f"| {kind}s | {one['name']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def sequence_table() -> str:
    """One kind erased concept by concept until one is left, and how far the average falls from that of one alone."""
    if not SEQUENCE.exists():
        return NOT_YET
    report = _read(SEQUENCE)
    single, sequence = (report["protocols"][name] for name in ("single", "sequence"))
    lines = ["| erased at once | by | UA | RA | CRA | average | fall |", "|---|---|---|---|---|---|---|"]
    for kind in KINDS:
        for method, groups in sequence.items():
            group = groups[kind]
            fall = single[method][kind]["scores"]["average"]["mean"] - group["scores"]["average"]["mean"]
            count = f"{len(group['cases'])} of {len(group['cases']) + 1} {kind}s"
            lines.append(f"| {count} | {method} | {_scores(group, ('UA', 'IRA', 'CRA', 'average'))} | {fall:.1f} |")
    return "\n".join([*lines, "", _means_over_seeds(report)])


BARS = {"object": {"UA": 97, "IRA": 97, "CRA": 98}, "style": {"UA": 95, "IRA": 95, "CRA": 95}}
"""Means that one latent a concept was to reach, of concepts erased one at a time."""
IN_SEQUENCE = {("UA", "UA"): 92, ("IRA", "RA"): 90}
"""The same for all objects but one, by (score, its name there)."""
CONTENDERS = ("saemnesia-exact", "saemnesia-contrast")


def bars_table() -> str:
    """What MiniCanvas' erasures were to reach, and by how much they fall short."""
    if not SEQUENCE.exists():
        return NOT_YET
    single, sequence = _read(EVALUATION)["protocols"]["single"], _read(SEQUENCE)["protocols"]["sequence"]

    def means(protocol: dict[str, Any], kind: str, score: str) -> list[float]:
        return [protocol[method][kind]["scores"][score]["mean"] for method in ("saeuron-exact", *CONTENDERS)]

    def row(what: str, sign: str, bar: float, reached: Sequence[float]) -> str:
        short = [(bar - found if sign == "≥" else found - bar) for found in reached]
        cells = [
            f"{found:.1f}" + (f", **{by:.1f} short**" if by >= 0.05 else "")
            for found, by in zip(reached, short, strict=True)
        ]
        return f"| {what} | {sign} {round(bar, 1):g} | {reached[0]:.1f} | {' | '.join(cells[1:])} |"

    average, at_once = (means(protocol, "object", "average") for protocol in (single, sequence))
    falls = [alone - together for alone, together in zip(average, at_once, strict=True)]
    debris = means(single, "object", "debris")
    rows = [
        *(
            row(f"{kind}s, {score}", "≥", bar, means(single, kind, score))
            for kind, bars in BARS.items()
            for score, bar in bars.items()
        ),
        *(
            row(f"7 of 8 objects, {name}", "≥", bar, means(sequence, "object", s))
            for (s, name), bar in IN_SEQUENCE.items()
        ),
        row("objects, average: SAeUron's", "≥", average[0], average),
        row("7 of 8 objects, fall of the average: SAeUron's", "≤", falls[0], falls),
        row("objects, debris: half of `exact`'s", "≤", debris[1] / 2, debris),
    ]
    heads = f"| bar | | saeuron-exact | {' | '.join(CONTENDERS)} |"
    return "\n".join([heads, "|---" * (3 + len(CONTENDERS)) + "|", *rows])


def trials_table() -> str:
    """What else was tried."""
    if not TRIALS.exists():
        return NOT_YET
    report = _read(TRIALS)
    columns = (*SCORES[:3], "average", "debris")
    lines = [f"| changed | to | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for trial in report["trials"]:
        cells = " | ".join(f"{trial['scores'][name]:.1f}" for name in columns)
        lines.append(f"| {trial['changed']} | {trial['name']} | {cells} |")
    counted = f"{len(report['seeds'])} seeds of {report['pictures_per_seed']} pictures for each"
    return "\n".join([*lines, "", f"Percent, means over the 8 objects, {counted}; {_device(report)}."])


def pairs_table() -> str:
    """Every two concepts of MiniCanvas, of one kind or of two, erased together."""
    if not PAIRS.exists():
        return NOT_YET
    report = _read(PAIRS)
    lines = ["| erased together | by | UA | IRA | CRA | debris | FID |", "|---|---|---|---|---|---|---|"]
    pairs = report["protocols"]["pairs"]
    for group in next(iter(pairs.values())):
        for method, groups in pairs.items():
            found = groups[group]
            scores = f"{_scores(found, SCORES)} | {found['fid']:.2f}"
            lines.append(f"| {len(found['cases'])} pairs, {group} | {method} | {scores} |")
    return "\n".join([*lines, "", _means_over_seeds(report)])


def search_table() -> str:
    """What it took to search a concept's setting."""
    if not all(path.exists() for path in SEARCHES):
        return NOT_YET
    lines = ["| searched by | concepts | runs a concept | seconds a concept |", "|---|---|---|---|"]
    for path in SEARCHES:
        found = _read(path)
        count = len(found["concepts"])
        seconds = f"{found['seconds'] / count:.1f}"
        lines.append(f"| {found['method']} | {count} | {found['runs_per_concept']} | {seconds} |")
    return "\n".join([*lines, "", f"Seconds of one process; {_device(found)}."])


def attack_table() -> str:
    """UA before an attack and after each that was run; in brackets if only prompts that can be written count."""
    reports = {name: _read(path) for name, path in ATTACKS.items() if path.exists()}
    if not reports:
        return NOT_YET
    lines = [f"| erased | by | UA before | {' | '.join(f'after {name}' for name in reports)} |"]
    lines.append("|---" * (3 + len(reports)) + "|")
    first = next(iter(reports.values()))
    for kind in KINDS:
        for method, groups in first["UA"].items():
            count = len({unit["concept"] for unit in first["units"] if unit["kind"] == kind})
            cells = [f"{groups[kind]['before']['mean']:.1f}"]
            for report in reports.values():
                units = [unit for unit in report["units"] if (unit["method"], unit["kind"]) == (method, kind)]
                cells.append(f"{report['UA'][method][kind]['after']['mean']:.1f} ({_written(units):.1f})")
            lines.append(f"| {count} {kind}s | {method} | {' | '.join(cells)} |")
    seeds, prompts = len({u["seed"] for u in first["units"]}), len(first["units"][0]["prompts"])
    budgets = "; ".join(
        f"{name}: {sum(u['pictures'] for u in report['units']) / sum(len(u['prompts']) for u in report['units']):.1f} "
        "pictures a prompt"
        for name, report in reports.items()
    )
    counted = f"{seeds} seed{'s' if seeds > 1 else ''}, {prompts} prompts a concept"
    return "\n".join([*lines, "", f"Percent, means over the concepts, {counted}; {budgets}; {_device(first)}."])


def _written(units: Sequence[dict[str, Any]]) -> float:
    """UA after an attack that counts for nothing where the text of its tokens does not read back as them."""
    prompts = [prompt for unit in units for prompt in unit["prompts"]]
    broken = [prompt["found_before"] or (prompt["found"] and prompt["writable"]) for prompt in prompts]
    return 100 - 100 * sum(broken) / len(broken)


def latents_table() -> str:
    """How far the concepts' latents stand out in each SAE (SPEC 2.2)."""
    columns = ("peak", "needed", "overlap")
    lines = [
        "| SAE | concepts | highest score | x SAeUron's | latents for 90 % of it | shared of the 10 best "
        "| separability |",
        "|---" * 7 + "|",
    ]
    first: dict[tuple[str, str], float] = {}
    separable = _read(SEPARABILITY)
    for name, kinds in _read(LATENTS).items():
        point = name.partition(" at ")[2]
        for kind, found in kinds.items():
            peak, needed, overlap = (found["mean"][column] for column in columns)
            ratio = f"{peak / first.setdefault((point, kind), peak):.1f}"
            count = len(found["concepts"])
            apart = separable[name][kind]["mean"]["separability"]
            shown = f"{peak:.3f} | {ratio} | {needed:.0f} | {100 * overlap:.0f} % | {apart:.2f}"
            lines.append(f"| {name} | {count} {kind}s | {shown} |")
    return "\n".join([*lines, "", "Means over the concepts; a score is a mean over the timesteps."])


def _scores(group: dict[str, Any], names: Sequence[str]) -> str:
    return " | ".join(_score(group["scores"][name]) for name in names)


def _means_over_seeds(report: dict[str, Any]) -> str:
    seeds, pictures = len(report["seeds"]), report["pictures_per_seed"]
    count = f"{seeds} seeds of {pictures} pictures" if seeds > 1 else f"{pictures} pictures"
    interval = ", ± half the 95 % t-interval over the seeds" if seeds > 1 else ""
    return f"Percent, means over the concepts, {count} for each{interval}; {_device(report)}."


def _score(score: dict[str, float | None]) -> str:
    width = score["plus_minus"]
    return f"{score['mean']:.1f}" + (f" ± {width:.1f}" if width is not None else "")


def demo_time() -> str:
    """Seconds per picture of the demo whose picture is shown."""
    report = _read(DEMO)
    seconds = report["seconds_per_image"]
    return (
        f"`saemnesia-fast demo` without {' and '.join(report['erased'])}, by {report['method']['name']}: "
        f"UA {report['UA']:.1f}, "
        f"IRA {report['IRA']:.1f}, CRA {report['CRA']:.1f} on {report['images']} pictures; "
        f"{seconds['before']:.3f} s a picture before, {seconds['after']:.3f} s after."
    )


def training_record() -> str:
    """What MiniCanvas is and what it took to make."""
    record = _read(RECORD)
    stages = record["stages"]
    generated = stages["unet"]["generated_accuracy"]
    fvu = [one["fvu"] for one in stages["sparse_autoencoders"].values() if isinstance(one, dict)]
    return (
        f"The committed weights took {record['total_minutes']:.0f} minutes from nothing, on "
        f"{record['machine']['threads']} of {record['machine']['cores']} CPU cores: "
        f"of its pictures {100 * generated['object']:.1f} % of objects and {100 * generated['style']:.1f} % of styles "
        f"are recognised, and its SAEs leave {100 * min(fvu):.1f} to {100 * max(fvu):.1f} % of the "
        "variance unexplained."
    )


def demo_backends() -> str:
    """What a picture of the demo costs, plain and erased by each backend."""
    if not DEMO_BACKENDS.exists():
        return NOT_YET
    report = _read(DEMO_BACKENDS)
    seconds = report["seconds_per_picture"]
    erased = [
        f"{times['p50']:.4f} s erased by `{name}` ({times['percent_longer']:+.1f} %)"
        for name, times in seconds.items()
        if name != "plain"
    ]
    return (
        f"A picture of MiniCanvas takes {seconds['plain']['p50']:.4f} s plain, {', '.join(erased)}: medians of "
        f"{report['rounds']} rounds of {report['pictures_a_round']} pictures, percent against the plain picture of the "
        f"same round; {report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['commit']}."
    )


def cpu_ops() -> str:
    """The `cpu` backend at full size against the baseline and the best competitor, and the plot of all of them."""
    if not OPS.exists():
        return NOT_YET
    from plot import newest
    from results import read_csv

    rows = newest(read_csv(OPS))
    baselines = {_case(row): row for row in rows if row.provider == row.baseline}
    ours = [row for row in rows if row.provider == "ours cpu" and row.vs_baseline and row.vs_best]
    lines = [
        "| op | case | tokens | baseline, ms | `cpu`, ms (p20-p80) | times as fast | as the best other |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ours:
        case = ", ".join(filter(None, [row.variant, f"{row.flagged} flagged" if row.flagged is not None else ""]))
        base = f"{row.baseline} {_milliseconds(baselines[_case(row)].p50_us)}"
        middle, low, high = map(_milliseconds, (row.p50_us, row.p20_us, row.p80_us))
        ratios = f"{row.vs_baseline:.3g} | {row.vs_best:.3g}"
        lines.append(f"| {row.op} | {case} | {row.M} | {base} | {middle} ({low}-{high}) | {ratios} |")
    last = ours[-1]
    size, where = f"d = {last.d}, N = {last.N}, k = {last.k}, {last.dtype}", f"{last.machine}, {last.threads} threads"
    commits = ", ".join(dict.fromkeys(row.commit for row in ours))
    lines += ["", f"{size}; {where}, torch {last.torch}, {commits}."]
    if PLOT.exists():
        lines += ["", f"![Every op and provider](../{PLOT.relative_to(ROOT).as_posix()})"]
    return "\n".join(lines)


def train_step() -> str:
    """A training step of everyone: time, memory, and the parts of ours."""
    if not TRAIN_STEP.exists():
        return NOT_YET
    from plot import newest
    from results import read_csv
    from train_step import StepRow, phases

    rows = [row for row in newest(read_csv(TRAIN_STEP, StepRow)) if row.p50_us]
    lines = [
        "| M | N | case | step | ms (p20-p80) | x dense | x best | peak MB | of dense | beyond state | of dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        middle, low, high = map(_milliseconds, (row.p50_us, row.p20_us, row.p80_us))
        shares = (row.vs_baseline, row.vs_best, row.of_baseline_peak, row.of_baseline_working)
        ratios = [f"{share:.3g}" if share else "" for share in shares]
        name = f"{row.provider} {row.version}".strip()
        size = f"| {row.M} | {row.N} | {row.variant} | {name} | {middle} ({low}-{high})"
        peak, working = (f"{number / 1e6:.0f}" for number in (row.peak_bytes, row.working_bytes))
        lines.append(f"{size} | {ratios[0]} | {ratios[1]} | {peak} | {ratios[2]} | {working} | {ratios[3]} |")
    lines += [
        "",
        "| M | N | case | ours | floor, ms | step | encode | loss | gradients | update "
        "| MB: encode | loss | gradients | update |",
        "|---" * 14 + "|",
    ]
    for row in rows:
        if row.encode_bytes is not None:
            times = " | ".join(map(_milliseconds, (row.floor_us or 0.0, row.p50_us, *phases(row))))
            sizes = " | ".join(f"{size / 1e6:.3g}" for size in phases(row, "bytes"))
            name = row.provider.removeprefix("ours ")
            lines.append(f"| {row.M} | {row.N} | {row.variant} | {name} | {times} | {sizes} |")
    others = dict.fromkeys(f"{row.provider}: {row.differs}" for row in rows if row.differs)
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    where = f"{last.machine}, {last.threads} threads, torch {last.torch}, {commits}"
    return "\n".join([*lines, "", f"d = {last.d}, k = {last.k}, {last.dtype}; {where}. {'; '.join(others)}."])


def minicanvas_sae() -> str:
    """MiniCanvas' SAEs, trained as before and as now."""
    if not MINICANVAS_SAE.exists():
        return NOT_YET
    report = _read(MINICANVAS_SAE)
    lines = ["| SAE at | trained | seconds | FVU, held out |", "|---|---|---|---|"]
    for point, ways in report["points"].items():
        for way, found in ways.items():
            seconds, fvu = sorted(one["seconds"] for one in found), sorted(one["fvu"] for one in found)
            lines.append(
                f"| {point} | {way} | {median(seconds):.1f} ({seconds[0]:.1f}-{seconds[-1]:.1f}) "
                f"| {median(fvu):.4f} ({fvu[0]:.4f}-{fvu[-1]:.4f}) |"
            )
    what = f"Medians (range) of {len(found)} seeds, {report['steps']} steps of {report['tokens_a_step']} tokens"
    where = f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['commit']}"
    return "\n".join([*lines, "", f"{what}; {where}."])


def supervised_step() -> str:
    """What supervision adds to a training step."""
    if not SUPERVISED_STEP.exists():
        return NOT_YET
    report = _read(SUPERVISED_STEP)
    lines = ["| step | ms (p20-p80) | extra, median of pairs (95 %) |", "|---|---|---|"]
    for way, found in report["ways"].items():
        middle, low, high = (f"{found[f'p{percent}_ms']:.3g}" for percent in (50, 20, 80))
        least, most = found["extra_interval"]
        extra = f"{found['extra_percent']:+.1f} % ({least:+.1f} to {most:+.1f})" if way != "unsupervised" else ""
        lines.append(f"| {way} | {middle} ({low}-{high}) | {extra} |")
    size = report["size"]
    concepts = f"{size['objects']} objects and {size['styles']} styles"
    batch = f"{size['images']} images of {size['tokens']} tokens, d = {size['d']}, N = {size['num_latents']}"
    where = f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['commit']}"
    return "\n".join([*lines, "", f"{batch}, k = {size['k']}, {concepts}; {report['rounds']} rounds; {where}."])


def aot_table() -> str:
    """What every kernel takes on every architecture, as its budget says."""
    rows: dict[str, dict[str, str]] = {}
    for name, budget in _read(BUDGETS).items():
        kernel, architecture = name.rsplit(" ", 1)
        cell = f"{budget['registers']} / {budget['shared'] / 1024:.3g} {budget['matrix'] or ''}".rstrip()
        rows.setdefault(kernel, {})[architecture] = cell
    columns = sorted({column for row in rows.values() for column in row}, key=lambda column: int(column[3:]))
    table = [["registers / KiB", *columns], ["---"] * (1 + len(columns))]
    table += [[f"`{kernel}`", *(row.get(column, "") for column in columns)] for kernel, row in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g}" if microseconds < 1e6 else f"{microseconds / 1000:.0f}"


def host_cost() -> str:
    """What an applied erasure costs the host in a UNet call, beside the same call without it."""
    if not OPS.exists():
        return NOT_YET
    from plot import newest
    from results import read_csv

    rows = [row for row in newest(read_csv(OPS)) if row.op == "hooks" and row.p50_us]
    plain = next(row for row in rows if row.provider == row.baseline)
    costs = {row.provider.removeprefix("ours, "): row.p50_us - plain.p50_us for row in rows if row is not plain}
    return (
        f"In a pipeline: {costs['hooks and lookup']:.0f} µs with the edit on the CPU left out, "
        f"{costs['Triton without a device']:.0f} µs with Triton's launches and a driver that does nothing. In a bare "
        f"UNet, which is verified in every call: {costs['that in a bare UNet']:.0f} µs. Medians, beside a plain call; "
        f"{plain.machine}, torch {plain.torch}, {plain.commit}."
    )


def _case(row: Any) -> tuple[Any, ...]:
    return row.op, row.M, row.dtype, row.weights, row.variant, row.flagged


FIGURES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"erasure-table": erasure_methods, "demo-time": demo_time, "training-record": training_record},
    "CHANGELOG.md": {"demo-backends": demo_backends},
    "docs/evaluation.md": {
        "erasure-table": erasure_table,
        "settings-table": settings_table,
        "sequence-table": sequence_table,
        "bars-table": bars_table,
        "trials-table": trials_table,
        "pairs-table": pairs_table,
        "search-table": search_table,
        "latents-table": latents_table,
        "attack-table": attack_table,
    },
    "docs/kernels.md": {"aot-table": aot_table, "cpu-ops": cpu_ops, "host-cost": host_cost},
    "docs/training.md": {
        "train-step": train_step,
        "minicanvas-sae": minicanvas_sae,
        "supervised-step": supervised_step,
    },
}
"""{file: {marker: what stands there}}."""


def render(file: str, text: str) -> str:
    """`text` of a file with every figure replaced by what the results say."""
    for name, figure in FIGURES[file].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, figure=figure: f"{found[1]}{figure()}\n{found[2]}", text)
    return text


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _device(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, diffusers {machine['diffusers']}"


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    for file in FIGURES:
        path = ROOT / file
        path.write_text(render(file, path.read_text(encoding="utf-8")), encoding="utf-8")
