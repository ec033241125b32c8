"""Where the numbers of a training run go: metrics.jsonl, and TensorBoard or wandb when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from saemnesia_fast.files import naming_full_disk, write_atomic


class MetricsLog(Protocol):
    def write(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the step `metrics["step"]`."""

    def close(self) -> None:
        """Flush what is held."""


class JsonLines:
    """One JSON object a line; lines after `step` are dropped first, so that a resumed run repeats none."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            write_atomic(path, "".join(line for line in lines if _step_of(line) <= step).encode())
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, metrics: Mapping[str, float]) -> None:
        line = (json.dumps(dict(metrics)) + "\n").encode()
        with naming_full_disk(self._path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("log_to: 'tensorboard' needs `pip install tensorboard`") from error
        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project that WANDB_PROJECT names."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("log_to: 'wandb' needs `pip install wandb`") from error
        self._run = wandb.init(dir=str(folder), config=dict(config))

    def write(self, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        self._run.finish()


def open_logs(folder: Path, log_to: Sequence[str], config: Mapping[str, Any], step: int) -> list[MetricsLog]:
    """metrics.jsonl in `folder` and whatever `log_to` names; `step` is the last one of an earlier run."""
    logs: list[MetricsLog] = []
    if "tensorboard" in log_to:
        logs.append(TensorBoard(folder / "tensorboard"))
    if "wandb" in log_to:
        logs.append(WeightsAndBiases(folder, config))
    return [JsonLines(folder / "metrics.jsonl", step), *logs]


def _step_of(line: str) -> float:
    """The step of a line; infinity for the torn last line of a run that was killed."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
