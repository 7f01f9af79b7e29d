"""What does a run folder hold? `read_run` gathers it: the plan, what happened, how good the result is.

| file | by | |
| --- | --- | --- |
| `plan.json`, `recipe.json`, `log.jsonl` | `effnet train` | without them the folder is not a run |
| `best.safetensors` | `effnet train` | after the first epoch |
| `eval.json`, `predictions.csv` | `effnet eval` | an `Evaluation`; a row per image |
| `split.json` | `effnet train` | how its data was cut |
| `published.json` | a person | what others reached on the same data: a list of `Published` |

`History` is the log read back: curves are arrays over the steps, and everything that has to be counted per phase or per
epoch is counted here, so that a report, a table and a plot cannot count differently.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from effnet import checkpoint
from effnet.checkpoint import Checkpoint
from effnet.evaluate import Evaluation
from effnet.plan import Plan
from effnet.recipes import Recipe
from effnet.value import UsageError, Value, check_choice
from effnet.words import METRICS, SHARES

STEP_FIELDS = ("step", "epoch", "phase", "loss", "lr", "wait_ms", "step_ms")


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """A run's events, sorted by kind. `starts`: of the first process, and of each one that resumed.

    `steps`: float64 (S,) per name of `STEP_FIELDS`. `epochs`: the epoch events, each with its `val` metrics, {} where
    there are no validation images. `skipped`: (image, reason). `ending`: the kind of the last event, if that is `end`
    or, after a signal, `stop`; None for a run that goes on, or was killed.
    """

    starts: tuple[Mapping[str, Any], ...]
    steps: Mapping[str, np.ndarray]
    epochs: tuple[Mapping[str, Any], ...]
    skipped: tuple[tuple[str, str], ...]
    save_failures: tuple[str, ...]
    early_stop: bool
    ending: str | None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The epoch whose weights were kept; None when no epoch was finished."""
        return next((epoch for epoch in reversed(self.epochs) if epoch["best"]), None)

    @property
    def judged(self) -> bool:
        """Whether there were validation images: then every epoch has metrics of them."""
        return any(epoch["val"] for epoch in self.epochs)

    @property
    def seconds(self) -> float:
        """Time spent in steps and validation, over all processes: not their start, and not the time between them."""
        return self._seconds(np.ones(len(self.steps["step"]), dtype=bool), self.epochs)

    def phase_seconds(self, index: int) -> float:
        """The part of `seconds` that belongs to one phase."""
        return self._seconds(self.steps["phase"] == index, [epoch for epoch in self.epochs if epoch["phase"] == index])

    def phase_steps(self, index: int) -> int:
        """Finished steps of one phase."""
        return int((self.steps["phase"] == index).sum())

    def wait_share(self, epoch: int | None = None) -> float:
        """The share of the time of all steps, or of one epoch's, in which the model waited for images; NaN if none."""
        at = slice(None) if epoch is None else self.steps["epoch"] == epoch
        total = self.steps["step_ms"][at].sum()
        return float(self.steps["wait_ms"][at].sum() / total) if total > 0 else float("nan")

    def _seconds(self, steps: np.ndarray, epochs: Any) -> float:
        return float(self.steps["step_ms"][steps].sum()) / 1e3 + sum(epoch["seconds"] for epoch in epochs)


@dataclass(frozen=True, kw_only=True)
class Published(Value):
    """A result of others. `value`: of a metric of `words.METRICS`; a share above 1 is read as a percentage."""

    name: str
    metric: str
    value: float
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)

    @property
    def on_scale(self) -> float:
        """The value on the scale of `Evaluation.metrics`."""
        return self.value / 100 if self.metric in SHARES and self.value > 1 else self.value


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row of `predictions.csv`: one image, its true and its predicted class, the probability of the latter."""

    id: str
    label: str
    predicted: str
    confidence: float
    weight: float
    group: str

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.label == self.predicted


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the folder holds. `cut`: arguments of `open_data`. `saved`: the best weights, or why there are none."""

    folder: Path
    plan: Plan
    recipe: Recipe
    history: History
    cut: Mapping[str, Any]
    evaluation: Evaluation | None
    predictions: tuple[Judged, ...]
    published: tuple[Published, ...]
    saved: Checkpoint | UsageError

    @property
    def start(self) -> Mapping[str, Any]:
        """The event with which the run began: data, note, environment."""
        return self.history.starts[0]

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Of the evaluation; without one, of the validation images at the epoch that was kept; or none at all."""
        if self.evaluation is not None:
            return self.evaluation.metrics
        return self.history.best["val"] if self.history.best else {}


def read_run(folder: str | Path) -> Run:
    """Everything in a run folder. `UsageError` for a folder that is not a run, and for a file that cannot be read."""
    folder = Path(folder)
    for name in ("plan.json", "recipe.json", "log.jsonl"):
        if not (folder / name).is_file():
            reason = f"it has no {name}" if folder.is_dir() else "there is no such folder"
            raise UsageError(f"{folder} is not a run folder: {reason}. `effnet train DATA --out {folder}` makes one.")
    evaluation = _read(folder / "eval.json", _evaluation)
    return Run(
        folder=folder,
        plan=_read(folder / "plan.json", Plan.from_json),
        recipe=_read(folder / "recipe.json", Recipe.from_json),
        history=_read(folder / "log.jsonl", read_history),
        cut=_read(folder / "split.json", json.loads) or {},
        evaluation=evaluation,
        predictions=(_read(folder / "predictions.csv", _judged) or ()) if evaluation else (),
        published=_read(folder / "published.json", _published) or (),
        saved=_saved(folder / "best.safetensors"),
    )


def read_history(log: str) -> History:
    """The history in the text of a `log.jsonl`. `UsageError` when it is not the log of a run."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    events = _events(log)
    for event in events:
        kinds.setdefault(event["event"], []).append(event)
    if "start" not in kinds:
        raise UsageError("it has no start event.")
    steps, last = kinds.get("step", []), events[-1]["event"]
    return History(
        starts=tuple(kinds["start"]),
        steps={name: np.array([step[name] for step in steps], dtype=np.float64) for name in STEP_FIELDS},
        epochs=tuple(kinds.get("epoch", ())),
        skipped=tuple((event["image"], event["reason"]) for event in kinds.get("skip", ())),
        save_failures=tuple(text for event in events for text in event.get("save_failed", ())),
        early_stop="early_stop" in kinds,
        ending=last if last in ("end", "stop") else None,
    )


def _events(log: str) -> list[dict[str, Any]]:
    """The log's lines, up to one that a kill has torn: resuming reads no further, either."""
    events = []
    for line in log.splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the file; None when there is no file. `UsageError` names the file."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except KeyError as error:
        raise UsageError(f"{path} cannot be read: {error} is missing.") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _evaluation(text: str) -> Evaluation:
    """An `Evaluation`, whatever else `effnet eval` noted beside it."""
    known = {field.name for field in fields(Evaluation)}
    return Evaluation.from_dict({name: value for name, value in json.loads(text).items() if name in known})


def _judged(text: str) -> tuple[Judged, ...]:
    return tuple(
        Judged(
            id=row["id"],
            label=row["label"],
            predicted=row["predicted"],
            confidence=float(row[f"p({row['predicted']})"]),
            weight=float(row["weight"]),
            group=row["group"],
        )
        for row in csv.DictReader(io.StringIO(text, newline=""))
    )


def _published(text: str) -> tuple[Published, ...]:
    return tuple(Published.from_dict(row) for row in json.loads(text))


def _saved(path: Path) -> Checkpoint | UsageError:
    try:
        return checkpoint.load(path)
    except UsageError as error:
        return error
