"""What happened, line by line? The log of a run: JSON lines that survive a kill, a full disk and a step back.

Every event is one line of `log.jsonl`, written when it happens. A kill may tear the last line, so nothing behind a torn
line counts. When a run goes on from a saved state, what was logged after it is dropped: it will happen again, with the
same numbers. When the disk is full, lines wait in memory until there is room.
"""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from effnet.files import write_atomically

Event = dict[str, Any]
AGAIN = ("phase", "early_stop")  # events of the step at which a run goes on that will happen again


class JournalWarning(UserWarning):
    """The log cannot be written for now."""


class Journal:
    """The log at `path`. A `silent` one (of every process but the first) writes nothing."""

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        self.path = path
        self.silent = silent
        self._waiting = ""  # lines that the disk has not taken
        self._warned = False

    def begin(self) -> None:
        """Makes the log empty."""
        if not self.silent:
            self.path.write_text("")

    def add(self, event: Event) -> Event:
        """The event, once it stands in the log; or waits, with one warning, when the disk does not take it."""
        if self.silent:
            return event
        self._waiting += json.dumps(event) + "\n"
        try:
            with open(self.path, "a") as file:
                end = os.fstat(file.fileno()).st_size
                try:
                    file.write(self._waiting)
                    file.flush()
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), end)  # no half line
                    raise
            self._waiting = ""
        except OSError as error:
            if not self._warned:
                message = f"cannot write {self.path}: {error.strerror}; the run goes on, its log waits in memory."
                warnings.warn(message, JournalWarning, stacklevel=2)
            self._warned = True
        return event

    def keep(self, step: int, *, judged: bool, rollbacks: int) -> None:
        """Drops what was logged after the state that is gone back to: `step` finished steps, `rollbacks` before it.

        `judged`: whether the epoch that ends with that step was evaluated.
        """
        if self.silent:
            return
        kept, (at, dropped) = [], (step, AGAIN if judged else (*AGAIN, "epoch", "save"))
        written = self.path.read_text() if self.path.exists() else ""
        for line in (written + self._waiting).splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill
                break
            again = event["event"] in dropped and event["step"] == at
            if event.get("step", 0) > step or again or event.get("rollbacks", 0) > rollbacks:
                break
            kept.append(line + "\n")
        self._waiting = ""
        write_atomically(self.path, lambda file: file.write_text("".join(kept)))
