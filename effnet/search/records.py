"""Where are trials kept, and who works on which? Optuna's storage: a SQLite file, or a database that machines share.

A trial is a row with a number. Whoever wants to work on it enters itself as its owner, in one SQL statement that
succeeds for one only; an owner that died (its process is gone, or it has been silent for `SILENCE` seconds on another
machine) can be replaced in the same way. What a trial is told to try is written before it is tried, every rung as it is
finished: a kill at any moment loses the training under way, and nothing else.

A database that does not answer is waited for; then a `UsageError` says so, and the same command goes on later.
"""

import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from effnet.search.space import Code
from effnet.search.strategies import Seen
from effnet.search.task import Task
from effnet.value import UsageError, Value

State = Literal["waiting", "running", "finished", "stopped", "failed"]

SILENCE = 120.0  # seconds without a sign of life after which an owner on another machine counts as dead
BEAT = 15.0  # seconds between signs of life
NAME = "effnet"  # of the study in its database; another one behind a # in its address
_LIVE: set[str] = set()  # the owners of this process that are at work


class StudyWarning(UserWarning):
    """Something about a study that the user should know, and that goes on by itself."""


@dataclass(frozen=True, kw_only=True)
class Trial(Value):
    """A candidate and what became of it. `results`: its quantities by rung, with `epochs` and `seconds`.

    `state`: `finished` reached the last rung, `stopped` did not go on from one, `failed` says why in `reason`.
    """

    number: int
    state: State
    code: Code | None = None
    key: str = ""
    results: tuple[dict[str, float], ...] = ()
    reason: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Its quantities on the last rung that it reached."""
        return self.results[-1] if self.results else {}

    def seen(self, task: Task) -> Seen:
        """The trial as a strategy sees it."""
        assert self.code is not None
        gains = task.gains(self.values) if self.state in ("finished", "stopped") else None
        return Seen(number=self.number, code=self.code, gains=gains, rung=max(0, len(self.results) - 1))


def optuna_() -> Any:
    """The package optuna, quiet. `UsageError` where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError('a search keeps its study with optuna: pip install "effnet[search]".') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(kw_only=True)
class Records:
    """The trials of one study. Made by `opened`; `patience`: seconds that a silent database is waited for."""

    storage: Any
    study: int
    place: str
    patience: float = 600.0
    pause: float = 1.0
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    # -- reading -----------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All of them, by number."""
        return [_trial(row) for row in self._rows()]

    def note(self, name: str) -> Any:
        """What was kept beside the trials under that name; None where there is nothing."""
        return self._patiently(self.storage.get_study_user_attrs, self.study).get(name)

    def keep_note(self, name: str, value: Any) -> None:
        """Keeps a value (JSON) beside the trials."""
        self._patiently(self.storage.set_study_user_attr, self.study, name, value)

    def _rows(self) -> list[Any]:
        rows = self._patiently(self.storage.get_all_trials, self.study, deepcopy=False)
        return sorted(rows, key=lambda row: row.number)

    # -- owning ------------------------------------------------------------------------------------------------------

    def claim(self, trials: int) -> Trial | None:
        """A trial below number `trials` that nobody works on, the lowest; None where there is none. It is ours then."""
        while True:
            rows = self._rows()
            for row in rows[:trials]:
                if not row.state.is_finished() and (self._mine(row) or (self._dead(row) and self._own(row))):
                    return _trial(self._row(row.number))
            if len(rows) >= trials:
                return None
            optuna = optuna_()
            empty = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
            self._patiently(self.storage.create_new_trial, self.study, empty)

    def before(self, number: int, heard: int = 0) -> list[Trial]:
        """The trials below `number`, once each is told what to try, and those below `heard` have ended.

        `Orphan` where that would never be, as the owner of one is dead: it is ours then, to be told or tried first.
        """
        pause = 0.05
        while True:
            rows = self._rows()[:number]
            open_ = [row for row in rows if not row.state.is_finished()]
            awaited = [row for row in open_ if "code" not in row.user_attrs or row.number < heard]
            if not awaited:
                return [_trial(row) for row in rows]
            lowest = awaited[0]
            if self._dead(lowest) and self._own(lowest):
                raise Orphan(lowest.number, told="code" in lowest.user_attrs)
            time.sleep(pause)
            pause = min(1.25 * pause, 1.0)

    def _row(self, number: int) -> Any:
        return self._rows()[number]

    def _id(self, number: int) -> int:
        return self._row(number)._trial_id

    def _mine(self, row: Any) -> bool:
        return row.user_attrs.get("owner", {}).get("token") == self.token

    def _dead(self, row: Any) -> bool:
        """Whether nobody works on a trial that is not finished."""
        owner = row.user_attrs.get("owner")
        if owner is None:
            return True
        if owner["host"] != socket.gethostname():
            return time.time() - row.user_attrs.get("beat", owner["since"]) > SILENCE
        if owner["pid"] == os.getpid() and owner["started"] == _started(os.getpid()):
            return owner["token"] not in _LIVE
        return _started(owner["pid"]) != owner["started"]

    def _own(self, row: Any) -> bool:
        """Enters this process as the owner, if nobody else did since `row` was read: in one statement."""
        import sqlalchemy.exc

        me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        me |= {"token": self.token, "since": time.time()}
        before = row.user_attrs.get("owner")
        table = "trial_user_attributes"
        if before is None:
            sql = f"INSERT INTO {table} (trial_id, key, value_json) VALUES (:trial, 'owner', :me)"
        else:
            sql = f"UPDATE {table} SET value_json = :me WHERE trial_id = :trial AND key = 'owner'"
            sql += " AND value_json = :before"
        words = {"trial": row._trial_id, "me": json.dumps(me), "before": json.dumps(before)}

        def enter() -> bool:
            with _engine(self.storage).begin() as connection:
                return connection.execute(sqlalchemy.text(sql), words).rowcount == 1

        try:
            return self._patiently(enter)
        except sqlalchemy.exc.IntegrityError:
            return False

    @contextmanager
    def at_work(self) -> Generator[None]:
        """While inside, what this process owns counts as worked on."""
        _LIVE.add(self.token)
        try:
            yield
        finally:
            _LIVE.discard(self.token)

    @contextmanager
    def beating(self, number: int) -> Generator[None]:
        """Gives signs of life for a trial while inside, for other machines to see."""
        stop, place = threading.Event(), self._id(number)

        def beat() -> None:
            while not stop.wait(BEAT):
                try:
                    self.storage.set_trial_user_attr(place, "beat", time.time())
                except Exception:
                    continue  # a database that is away for a while: the next beat tries again

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    # -- writing -----------------------------------------------------------------------------------------------------

    def tell(self, number: int, code: Code, key: str) -> None:
        """Writes down what the trial tries."""
        place = self._id(number)
        self._attr(place, "code", {"code": list(code), "key": key})
        self._patiently(self.storage.set_trial_state_values, place, optuna_().trial.TrialState.RUNNING)

    def reach(self, number: int, results: Sequence[dict[str, float]]) -> None:
        """Keeps the results of the rungs so far: they are in the database when this returns."""
        self._attr(self._id(number), "results", list(results))

    def end(self, number: int, state: State, values: Sequence[float] = (), reason: str = "") -> None:
        """Ends a trial. `values`: of the objectives, for Optuna's own tools."""
        optuna, place = optuna_(), self._id(number)
        states = optuna.trial.TrialState
        if reason:
            self._attr(place, "reason", reason)
        ended = {"finished": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}[state]
        kept = list(values) if state == "finished" else None

        def write() -> None:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # it was written, only the answer was lost
                self.storage.set_trial_state_values(place, ended, kept)

        self._patiently(write)

    def _attr(self, place: int, name: str, value: Any) -> None:
        self._patiently(self.storage.set_trial_user_attr, place, name, value)

    # -- patience ----------------------------------------------------------------------------------------------------

    def _patiently(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Does it; where the database does not answer, again and again, up to `patience` seconds."""
        import sqlalchemy.exc

        away = (optuna_().exceptions.StorageInternalError, sqlalchemy.exc.OperationalError,
                sqlalchemy.exc.InterfaceError)  # fmt: skip
        since, pause = time.monotonic(), self.pause
        while True:
            try:
                return work(*args, **options)
            except away as error:
                if pause == self.pause:
                    words = f"the study's database {self.place} does not answer ({_first_line(error)})"
                    warnings.warn(StudyWarning(f"{words}: waiting up to {self.patience:.0f} s."), stacklevel=2)
                waited = time.monotonic() - since
                if waited > self.patience:
                    raise UsageError(
                        f"the study's database {self.place} has not answered for {waited:.0f} s: {_first_line(error)}. "
                        "What is finished is kept there; the same command goes on."
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 30.0)


class Orphan(Exception):
    """A trial that others wait for, of a process that died; it is ours now. `told`: it was said what to try."""

    def __init__(self, number: int, *, told: bool) -> None:
        super().__init__(f"trial {number}")
        self.number, self.told = number, told


def opened(study: str | Path, task: Task, *, patience: float = 600.0) -> Records:
    """The records of `study`, a SQLite file or a database's address (`postgresql://.../name#study`), made if new.

    `UsageError` for a file that is no study, or one of another task: it names the difference.
    """
    optuna = optuna_()
    address, name = _address(study)
    import sqlalchemy.exc
    import sqlalchemy.pool

    # no connection is kept between statements: a server that was restarted is met anew
    options: dict[str, Any] = {"poolclass": sqlalchemy.pool.NullPool}
    if address.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds that another process may be writing
    place = str(study) if "://" not in str(study) else sqlalchemy.engine.make_url(address).render_as_string()
    try:
        storage = optuna.storages.get_storage(optuna.storages.RDBStorage(address, engine_kwargs=options))
        number = _study(storage, name, task)
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError) as error:
        raise UsageError(f"{place} cannot be opened as a study: {_first_line(error)}.") from None
    records = Records(storage=storage, study=number, place=place, patience=patience)
    kept = records.note("task")
    if kept is None:
        records.keep_note("task", task.to_json())
        kept = records.note("task")
    # through `Task`, so that a study from before a field was there has its default
    _check_same(*(json.loads(each.to_json()) for each in (Task.from_json(kept), task)), place)
    return records


def _address(study: str | Path) -> tuple[str, str]:
    """The address as SQLAlchemy reads it, and the name of the study."""
    text = str(study)
    if "://" not in text:
        path = Path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(f"{path} is a folder; a study is a file, as in runs/search.db.")
        return f"sqlite:///{path}", NAME
    address, _, name = text.partition("#")
    for old in ("postgresql://", "postgres://"):
        if address.startswith(old):
            address = "postgresql+psycopg://" + address.removeprefix(old)
    return address, name or NAME


def _study(storage: Any, name: str, task: Task) -> int:
    optuna = optuna_()
    directions = optuna.study.StudyDirection
    goals = [directions.MAXIMIZE if each.goal == "max" else directions.MINIMIZE for each in task.objectives]
    try:
        return storage.create_new_study(goals, name)
    except optuna.exceptions.DuplicatedStudyError:
        return storage.get_study_id_from_name(name)


def _check_same(before: dict[str, Any], now: dict[str, Any], place: str) -> None:
    for name in sorted({*before, *now}):
        old, new = before.get(name, {}), now.get(name, {})
        if old == new:
            continue
        what = name
        if name == "space":
            old, new = (f"{s['name']} around {s['base']['name']} ({len(s['choices'])} choices)" for s in (old, new))
        elif isinstance(old, dict) and isinstance(new, dict):
            part = next(each for each in sorted({*old, *new}) if old.get(each) != new.get(each))
            what, old, new = f"{name} ({part})", old.get(part), new.get(part)
        raise UsageError(f"{place} is a study of another {what}: {old!s:.200}, now {new!s:.200}. Name another study.")


_STATES: dict[str, State] = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "running"}


def _trial(row: Any) -> Trial:
    told = row.user_attrs.get("code", {})
    return Trial(
        number=row.number,
        state=_STATES.get(row.state.name, "waiting"),
        code=tuple(told["code"]) if told else None,
        key=told.get("key", ""),
        results=tuple(row.user_attrs.get("results", ())),
        reason=row.user_attrs.get("reason", ""),
    )


def _engine(storage: Any) -> Any:
    return getattr(storage, "_backend", storage).engine


def _started(pid: int) -> str:
    """When a process was started, by the system's count; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # a system without /proc
        os.kill(pid, 0)
    except OSError:
        return ""
    return "alive"


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(str(getattr(cause, "orig", None) or cause).split("\n")[0].split())[:200].rstrip(".")
