"""Two drivers on one PostgreSQL study: a real server from Debian's package, in a temporary directory."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from effnet.search.records import opened
from effnet.search.study import found, search
from tests.conftest import missing
from tests.test_search_study import TASK, TRIALS, Counted, driver, tabulated

USER = "postgres"  # a server refuses to be run by root


@dataclass(kw_only=True)
class Server:
    """A PostgreSQL server on a port of its own."""

    programs: Path
    folder: Path
    port: int

    def run(self, *words: object) -> None:
        """One of its programs, as a user who may."""
        command = [str(self.programs / str(words[0])), *map(str, words[1:])]
        user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **user)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self.run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", self.folder / "data", "-w", "-m", "immediate", "stop")

    def url(self, name: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres#{name}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not homes:
        missing("Debian's package postgresql is not installed (apt-get install postgresql)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path has few letters
    made = Server(programs=homes[-1].parent, folder=folder, port=port)
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER, USER)
        made.run("initdb", "-D", folder / "data", "-U", USER, "-A", "trust", "--no-sync")
        made.start()
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_processes_share_a_study_and_train_nothing_twice(server: Server) -> None:
    url = server.url("shared")
    opened(url, TASK)
    processes = [driver(url), driver(url)]
    calls: list[str] = []
    for process in processes:  # both are inside an evaluation before either may finish one
        assert process.stdout
        calls.append(process.stdout.readline())
    for process in processes:
        out, _ = process.communicate("\n" * 100)
        assert process.returncode == 0
        calls += out.splitlines(keepends=True)
    assert len(calls) == len(set(calls))
    result = found(TASK, opened(url, TASK).trials())
    assert len({trial.key for trial in result.trials}) == TRIALS
    assert {trial.state for trial in result.trials} == {"finished", "stopped"}


def test_a_driver_that_is_killed_leaves_its_trial_to_the_other(server: Server) -> None:
    url = server.url("killed")
    opened(url, TASK)
    dead, alive = driver(url), Counted()
    assert dead.stdout and dead.stdin
    under_way = dead.stdout.readline().split()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    dead.stdout.close()
    dead.stdin.close()
    result = search(TASK, alive, url, trials=TRIALS)
    assert (under_way[1], int(under_way[2])) == alive.calls[0]
    assert len(result.trials) == TRIALS and result.count("running") == 0


def test_a_server_that_is_restarted_in_mid_search_costs_a_wait_and_no_trial(server: Server, tmp_path: Path) -> None:
    """It stops in an evaluation; the wait for it is what starts it again."""
    from effnet.search import records

    whole = search(TASK, tabulated, tmp_path / "whole.db", trials=TRIALS)
    evaluate = Counted(lambda call: server.stop() if call == 4 else None)
    sleep = records.time.sleep

    def back(seconds: float) -> None:
        if seconds >= 0.5:
            server.start()
        sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.time, "sleep", back)
        with pytest.warns(records.StudyWarning, match="does not answer"):
            result = search(TASK, evaluate, server.url("restarted"), trials=TRIALS)
    assert [trial.code for trial in result.trials] == [trial.code for trial in whole.trials]
    assert len(evaluate.calls) == len(set(evaluate.calls))


def test_the_password_is_not_told(server: Server) -> None:
    from effnet.value import UsageError

    url = f"postgresql://nobody:secret@127.0.0.1:{server.port}/postgres"
    with pytest.raises(UsageError, match="cannot be opened") as refusal:
        opened(url, TASK)
    assert "secret" not in str(refusal.value)
    assert sys.modules["psycopg"]
