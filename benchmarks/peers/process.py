"""A process that works when it is told to: each line that it is sent is answered by one line of JSON."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """Runs `command` at the root of the repository; `ready` is what it said when it had started."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
        self.ready = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with exit code {self.process.wait()}; its words are above.")
        return json.loads(line)

    def ask(self, line: str) -> Any:
        """What it answers to `line`."""
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> Any:
        """Tells it that no more lines come, waits for its end; its last words."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        last = self._answer()
        self.process.wait()
        return last


def serve(ready: Any, answer: Callable[[str], Any], last: Callable[[], Any], out: TextIO | None = None) -> None:
    """What a worker runs: says `ready`, answers lines until none come, says `last()`. `out`: by default stdout."""
    out = out or sys.stdout
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=out, flush=True)
    print(json.dumps(last()), file=out, flush=True)
