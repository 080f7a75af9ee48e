"""Studies: each configuration is scored once by however many workers, and what a dead one had begun is taken up again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import linears
import pytest
import torch
from torch import nn

import lamina
from lamina.errors import SearchError
from lamina.folder import digest
from lamina.goals import Milliseconds
from lamina.searches.score import called
from lamina.searches.screen import Screen
from lamina.searches.search import search
from lamina.searches.strategies import BreadthFirst, Exhaustive, Sampled
from lamina.searches.study import Ledger, Study, opened
from lamina.searches.trials import optuna_study
from lamina.supernet.space import as_json, key

HERE = Path(__file__).parent


def programs() -> Path | None:
    """The folder of the newest PostgreSQL server."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, default=None, key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server of this module's own, reached through a socket in its folder."""
    pytest.importorskip("psycopg")
    bin_folder = programs()
    if bin_folder is None:
        pytest.skip("there is no PostgreSQL server here: initdb is neither on the path nor under /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="lamina-pg-"))
    user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "nobody")
        user = ["runuser", "-u", "nobody", "--"]
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder}
    control = [*user, str(bin_folder / "pg_ctl"), "-D", str(data), "-w"]
    try:
        subprocess.run(
            [*user, str(bin_folder / "initdb"), "-D", str(data), "-A", "trust", "-U", "lamina", "-N"],
            check=True,
            **quiet,  # type: ignore[call-overload]
        )
        options = f"-k {folder} -c listen_addresses='' -F"
        subprocess.run([*control, "-l", str(folder / "log"), "-o", options, "start"], check=True, **quiet)  # type: ignore[call-overload]
        try:
            yield f"postgresql+psycopg://lamina@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def worker(url: str, log: Path, strategy: str, hang_at: int = 0, lease_s: float = 2.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), url, str(log), str(lease_s), strategy, str(hang_at)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(workers: list[subprocess.Popen[str]], log: Path) -> None:
    """Let workers begin at the same moment."""
    end = time.monotonic() + 90
    while len(list(log.parent.glob(f"{log.name}.ready-*"))) < len(workers):
        assert all(process.poll() is None for process in workers), [p.communicate()[1] for p in workers if p.poll() is not None]
        assert time.monotonic() < end, "the workers never got ready"
        time.sleep(0.05)
    Path(f"{log}.go").touch()


def outputs(workers: list[subprocess.Popen[str]]) -> list[str]:
    found = []
    for process in workers:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(out.strip())
    return found


def killed_while_it_scores(process: subprocess.Popen[str], log: Path) -> str:
    """Wait until a worker hangs in its score, and kill it; returns the key of the configuration that it had."""
    sign = Path(f"{log}.hangs")
    end = time.monotonic() + 60
    while not (sign.exists() and sign.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the worker never came to its score"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return sign.read_text()


def scored_in(log: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def trials_in(url: str) -> Counter[str]:
    with opened(Study(url)) as ledger, optuna_study(ledger) as study:
        return Counter(trial.user_attrs["key"] for trial in study.get_trials())


@pytest.mark.slow
def test_four_workers_on_postgresql_score_each_configuration_once_though_one_is_killed(postgres: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    doomed, *rest = workers = [
        worker(postgres, log, "exhaustive", hang_at=3),
        *(worker(postgres, log, "exhaustive") for _ in range(3)),
    ]
    together(workers, log)
    lost = killed_while_it_scores(doomed, log)
    others = outputs(rest)
    counted = scored_in(log)
    assert len(counted) == 81
    assert {name: n for name, n in counted.items() if n != 1} == {lost: 2}
    alone = search(linears.supernet(), linears.score, strategy=Exhaustive(), limit=())
    assert set(others) == {f"{key(alone.best.config)} 81"}
    assert trials_in(postgres) == Counter(dict.fromkeys(counted, 1))
    with opened(Study(postgres)) as ledger:
        assert {name: n for name, n in ledger.attempts().items() if n != 1} == {lost: 2}


@pytest.mark.slow
def test_two_workers_on_sqlite_walk_breadth_first_together_though_one_is_killed(tmp_path: Path) -> None:
    url, log = f"sqlite:///{tmp_path / 's.db'}", tmp_path / "log"
    doomed, rest = workers = [worker(url, log, "breadth first", hang_at=2), worker(url, log, "breadth first")]
    together(workers, log)
    lost = killed_while_it_scores(doomed, log)
    (other,) = outputs([rest])
    counted = scored_in(log)
    assert {name: n for name, n in counted.items() if n != 1} == {lost: 2}
    alone = search(linears.supernet(), linears.score, strategy=BreadthFirst(beam=3, restarts=1), limit=())
    assert other == f"{key(alone.best.config)} {len(alone.scored)}"
    assert set(counted) == {key(trial.config) for trial in alone.trials}
    assert trials_in(url) == Counter(dict.fromkeys(counted, 1))


@pytest.mark.slow
def test_of_a_sampler_that_is_killed_no_trial_goes_on_for_ever(tmp_path: Path) -> None:
    url, log = f"sqlite:///{tmp_path / 's.db'}", tmp_path / "log"
    together([doomed := worker(url, log, "tpe", hang_at=3)], log)
    lost = killed_while_it_scores(doomed, log)
    outputs([worker(url, log, "tpe")])
    with opened(Study(url)) as ledger, optuna_study(ledger) as study:
        trials = study.get_trials()
    assert len(trials) >= 12 and all(trial.state.is_finished() for trial in trials)
    assert {trial.user_attrs["key"] for trial in trials} <= set(scored_in(log)) and lost in scored_in(log)
    assert len({trial.user_attrs["key"] for trial in trials}) == len(trials)


def taken(ledger: Ledger, keys: list[str], seconds: float = 5.0) -> list[str]:
    """What a worker claims in the end, as it watches rows of others."""
    end = time.monotonic() + seconds
    while not (mine := ledger.claim(dict.fromkeys(keys, "{}"), len(keys))) and time.monotonic() < end:
        time.sleep(0.02)
    return mine


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 's.db'}"


def test_a_claim_belongs_to_whoever_comes_first(url: str) -> None:
    wanted = {f"key{i}": "{}" for i in range(6)}
    with opened(Study(url, worker="a")) as a, opened(Study(url, worker="b")) as b:
        mine = a.claim(wanted, 2)
        others = b.claim(wanted, 10)
        assert len(mine) == 2
        assert sorted([*mine, *others]) == sorted(wanted)
        assert a.claim(wanted, 10) == b.claim(wanted, 10) == []


def test_a_lease_that_is_renewed_is_not_taken_over_and_one_that_ran_out_is(url: str) -> None:
    with opened(Study(url, worker="a", lease_s=0.4)) as a, opened(Study(url, worker="b", lease_s=30)) as b:
        with a.renewing(a.claim({"k": "{}"}, 1)):
            time.sleep(1.0)
            assert b.claim({"k": "{}"}, 1) == []
        assert taken(b, ["k"]) == ["k"]
        # The first worker was not dead but slow: what it brings comes too late.
        assert not a.finish("k", 1.0, None, 0.1)
        assert b.finish("k", 2.0, None, 0.1)
        assert [entry.score for entry in a.all()] == [2.0]


def test_a_configuration_over_which_three_workers_died_counts_as_failed(url: str) -> None:
    for number in range(3):
        with opened(Study(url, worker=f"w{number}", lease_s=0.01)) as ledger:
            assert taken(ledger, ["k"]) == ["k"]
    with opened(Study(url, worker="last")) as ledger:
        assert taken(ledger, ["k"], 0.5) == []
        (entry,) = ledger.all()
        assert entry.score is None
        assert entry.error == "3 workers died while they scored it, or took too long"


def test_a_released_claim_is_free_at_once(url: str) -> None:
    with opened(Study(url, worker="a")) as a, opened(Study(url, worker="b")) as b:
        a.release(a.claim({"k": "{}"}, 1))
        assert b.claim({"k": "{}"}, 1) == ["k"]
        assert b.attempts() == {"k": 1}


def test_a_search_that_is_interrupted_gives_back_what_it_had_and_goes_on(url: str) -> None:
    net = linears.supernet()
    calls = 0

    def interrupted(model: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return linears.score(model)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        search(net, interrupted, strategy=Sampled(trials=20), study=Study(url, score="worth"), limit=())
    scored = []
    score = lambda model: scored.append(0) or linears.score(model)  # type: ignore[func-returns-value] # noqa: E731
    result = search(net, score, strategy=Sampled(trials=20), study=Study(url, score="worth"), limit=())
    assert len(scored) == 20 - 4
    assert len(result.scored) == 20
    assert sum(trials_in(url).values()) == 20


def test_a_trial_that_a_dead_worker_did_not_tell_optuna_is_made_up_for(url: str) -> None:
    net = linears.supernet()
    config = next(iter(net.space))
    with opened(Study(url, lease_s=0.01)) as ledger:
        ledger.enter(net.space.fingerprint(), digest(dict(net.network.state_dict())), called(linears.score))
        ledger.claim({key(config): json.dumps(as_json(config))}, 1)
        ledger.finish(key(config), 0.5, None, 0.1)
    time.sleep(0.05)
    result = search(net, linears.score, strategy=Sampled(trials=20), study=url, limit=())
    assert next(trial for trial in result.trials if trial.config == config).score == 0.5
    assert trials_in(url) == Counter({key(trial.config): 1 for trial in result.trials})


def test_the_study_of_another_space_or_of_other_weights_is_refused(url: str) -> None:
    net = linears.supernet()
    search(net, linears.score, strategy=BreadthFirst(), study=url, limit=())
    other = linears.supernet()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(SearchError, match="gone on with: its scores are of other weights"):
        search(other, linears.score, study=url, limit=())
    smaller = linears.make_supernet(nn.Sequential(nn.Linear(16, 16)), torch.randn(1, 16), forms={"0": linears.FORMS})
    with pytest.raises(SearchError, match="its space is another, layers or forms differ; choose another name"):
        search(smaller, linears.score, study=url, limit=())
    search(other, linears.score, study=Study(url, name="other"), limit=())


UNREACHABLE = {
    "folder": ("sqlite:////nowhere/at/all/s.db", "cannot be reached: unable to open database file"),
    "server": ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "cannot be reached: connection failed"),
    "kind": ("mysql://x/y", "lives in SQLite or PostgreSQL, not in mysql"),
    "no url": ("search.db", "'search.db' is no database: write sqlite:///search.db"),
    "no file": ("sqlite://", "names no file"),
}


@pytest.mark.parametrize(("url", "says"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_study_that_cannot_be_reached_is_one_clear_line_without_a_password(url: str, says: str) -> None:
    with pytest.raises(SearchError, match=says) as caught:
        search(linears.supernet(), linears.score, study=url, limit=())
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("lease_s", [0, -1.0, float("nan"), float("inf")])
def test_a_lease_takes_a_positive_number_of_seconds(lease_s: float) -> None:
    with pytest.raises(SearchError, match="a lease takes a positive number"):
        Study("sqlite:///s.db", lease_s=lease_s)


# ---- what a study holds ----


def accuracy(model: nn.Module) -> float:
    return linears.score(model)


def minus_loss(model: nn.Module) -> float:
    return -100.0 - linears.score(model)


def test_a_study_holds_one_score_and_refuses_another(tmp_path: Path) -> None:
    url, net = f"sqlite:///{tmp_path}/s.db", linears.supernet()
    first = search(net, accuracy, strategy=Exhaustive(), study=url, limit=())
    asked: list[int] = []

    def other(model: nn.Module) -> float:
        asked.append(1)
        return minus_loss(model)

    with pytest.raises(SearchError, match=r"it holds scores by .*:accuracy, and this is .*other"):
        search(net, other, strategy=Exhaustive(), study=url, limit=())
    assert not asked
    # Under the name that it has there, on the user's word.
    again = search(net, other, strategy=Exhaustive(), study=Study(url, score=f"{accuracy.__module__}:accuracy"), limit=())
    assert not asked and again.best.score == first.best.score


def test_two_lambdas_are_two_scores(tmp_path: Path) -> None:
    url, net = f"sqlite:///{tmp_path}/s.db", linears.supernet()
    search(net, lambda model: linears.score(model), strategy=Exhaustive(), study=url, limit=())
    with pytest.raises(SearchError, match="it holds scores by"):
        search(net, lambda model: -linears.score(model), strategy=Exhaustive(), study=url, limit=())


def test_a_study_of_before_scores_had_names_takes_the_next_ones(tmp_path: Path) -> None:
    url, net = f"sqlite:///{tmp_path}/s.db", linears.supernet()
    first = search(net, accuracy, strategy=Exhaustive(), study=url, limit=())
    with sqlite3.connect(tmp_path / "s.db") as old:
        old.execute("ALTER TABLE lamina_studies DROP COLUMN score")
    assert search(net, accuracy, strategy=Exhaustive(), study=url, limit=()).best.score == first.best.score
    with pytest.raises(SearchError, match="it holds scores by"):
        search(net, minus_loss, strategy=Exhaustive(), study=url, limit=())


def test_a_score_that_was_mended_is_asked_again_for_what_it_failed(tmp_path: Path) -> None:
    url, net = f"sqlite:///{tmp_path}/s.db", linears.supernet()
    broken, asked = True, Counter[str]()

    def score(model: nn.Module) -> float:
        asked[key(linears.active(model))] += 1
        if broken and linears.active(model)["0"] == linears.FORMS[0]:
            raise NameError("a slip")
        return linears.score(model)

    first = search(net, score, strategy=Exhaustive(), study=url, limit=())
    assert len(first.failed) == 27 and max(asked.values()) == 1
    broken = False
    second = search(net, score, strategy=Exhaustive(), study=url, limit=())
    assert not second.failed and len(second.scored) == 81
    assert sorted(asked.values()) == [1] * 54 + [2] * 27


def test_what_fails_again_and_again_is_given_up_and_what_fails_wholly_is_not(tmp_path: Path) -> None:
    url, net, asked = f"sqlite:///{tmp_path}/s.db", linears.supernet(), 0

    def score(model: nn.Module) -> float:
        nonlocal asked
        asked += 1
        if linears.active(model)["0"] == linears.FORMS[0]:
            raise NameError("always")
        return linears.score(model)

    for _ in range(5):
        search(net, score, strategy=Exhaustive(), study=url, limit=())
    assert asked == 54 + 3 * 27

    def nothing(model: nn.Module) -> float:
        nonlocal asked
        asked += 1
        raise NameError("a slip in every one")

    asked = 0
    for _ in range(5):
        with pytest.raises(SearchError, match="the score failed for all 81"):
            search(net, nothing, strategy=Exhaustive(), study=Study(url, name="other"), limit=())
    assert asked == 5 * 81


@pytest.mark.parametrize("value", [None, "good", torch.ones(2), 1j], ids=str)
def test_what_is_no_number_fails_that_configuration_alone(value: object) -> None:
    class Odd:
        def score_many(self, net: object, configs: list[dict[str, object]]) -> list[object]:
            return [value if config["0"] == linears.FORMS[0] else 1.0 for config in configs]

    found = search(linears.supernet(), Odd(), strategy=Exhaustive(), limit=())
    assert len(found.failed) == 27 and len(found.scored) == 54


def test_times_that_were_taken_with_other_threads_are_refused(tmp_path: Path) -> None:
    url, before = f"sqlite:///{tmp_path}/s.db", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        search(linears.supernet(), accuracy, limit=Milliseconds(1e6), strategy=BreadthFirst(), study=url)
        torch.set_num_threads(2)
        with pytest.raises(SearchError, match=r"goes by times taken on .*1 threads.*, and here it is .*2 threads"):
            search(linears.supernet(), accuracy, limit=Milliseconds(1e6), strategy=BreadthFirst(), study=url)
        # What the supernet itself knows from before is taken anew.
        net = linears.supernet()
        net.time()
        torch.set_num_threads(1)
        assert search(net, accuracy, limit=Milliseconds(1e6)).best.plan.setting.threads == 1  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(before)


def test_a_score_that_hangs_is_taken_up_by_another_worker(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    with opened(Study(url, lease_s=0.2, score_s=0.4)) as first, opened(Study(url, lease_s=0.2)) as second:
        for ledger in (first, second):
            ledger.enter("space", "weights", "score")
        assert first.claim({"a": "{}"}, 1) == ["a"] and second.claim({"a": "{}"}, 1) == []
        with first.renewing(["a"]):
            time.sleep(0.3)
            assert second.claim({"a": "{}"}, 1) == []
            assert taken(second, ["a"]) == ["a"]
        assert second.finish("a", 1.0, None, 0.1) and not first.finish("a", 2.0, None, 9.0)


# ---- what may happen to a database, and to workers ----


def test_a_score_waits_for_a_database_that_is_away(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SQLite is away while another holds it: longer than any worker would wait for anything else."""
    monkeypatch.setattr("lamina.searches.study._PATIENCE_S", 0.5)
    with opened(Study(url)) as ledger:
        mine = ledger.claim({"k": "{}"}, 1)
        other = sqlite3.connect(tmp_path / "s.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        # The driver itself waits no longer than a moment here.
        monkeypatch.setattr(ledger, "_engine", _impatient(url))
        released = threading.Timer(3.0, lambda: other.execute("COMMIT"))
        released.start()
        with pytest.raises(SearchError, match="database is locked"):
            ledger.known(["k"])
        began = time.monotonic()
        assert ledger.finish(mine[0], 1.0, None, 0.1)
        assert time.monotonic() - began > 1.0
        released.join()
        other.close()


def _impatient(url: str) -> object:
    import sqlalchemy

    return sqlalchemy.create_engine(url, connect_args={"timeout": 0.05})


def test_what_will_not_pass_is_said_at_once(url: str, tmp_path: Path) -> None:
    with opened(Study(url)) as ledger:
        with sqlite3.connect(tmp_path / "s.db") as other:
            other.execute("DROP TABLE lamina_claims")
        began = time.monotonic()
        with pytest.raises(SearchError, match="no such table"):
            ledger.finish("k", 1.0, None, 0.1)
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_workers_outlive_a_server_that_is_away_for_seconds(postgres: str, tmp_path: Path) -> None:
    """The connections of all are cut, again and again, while two workers score."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE cut"))
    url, log = postgres.replace("/postgres?", "/cut?"), tmp_path / "log"
    workers = [worker(url, log, "exhaustive") for _ in range(2)]
    together(workers, log)
    with engine.connect() as connection:
        for _ in range(5):
            time.sleep(0.4)
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'cut'"
            connection.execute(sqlalchemy.text(cut))
    engine.dispose()
    found = outputs(workers)
    assert len(set(found)) == 1 and found[0].endswith(" 81")


def test_one_over_which_a_worker_died_is_taken_alone(url: str) -> None:
    keys = [f"k{i}" for i in range(4)]
    with opened(Study(url, worker="dead", lease_s=0.05)) as ledger:
        assert sorted(ledger.claim(dict.fromkeys(keys, "{}"), 4)) == keys
    with opened(Study(url, worker="next", lease_s=0.05)) as ledger:
        for _ in keys:
            (one,) = taken(ledger, keys)
            assert ledger.finish(one, 1.0, None, 0.1)
        assert taken(ledger, keys, 0.3) == []


def test_how_often_a_configuration_is_tried_is_the_users_to_say(url: str) -> None:
    for number in range(5):
        with opened(Study(url, worker=f"w{number}", lease_s=0.01, attempts=5)) as ledger:
            assert taken(ledger, ["k"]) == ["k"]
    with opened(Study(url, worker="last", attempts=5)) as ledger:
        assert taken(ledger, ["k"], 0.5) == []
        assert [entry.error for entry in ledger.all()] == ["5 workers died while they scored it, or took too long"]
    with pytest.raises(SearchError, match="attempts is 0; it must be a whole number of 1 or more"):
        Study(url, attempts=0)


def test_no_clock_of_another_machine_is_believed(url: str) -> None:
    """A dead worker's row holds no time at all; a live one's beat is what counts, whatever its clock says."""
    with opened(Study(url, worker="slow", lease_s=0.3)) as slow, opened(Study(url, worker="other", lease_s=0.3)) as other:
        mine = slow.claim({"k": "{}"}, 1)
        with slow.renewing(mine):
            assert taken(other, ["k"], 1.2) == []
        assert slow.finish("k", 1.0, None, 0.1)


def test_scores_that_an_older_lamina_wrote_are_taken_over(url: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as old:
        old.execute(
            "CREATE TABLE lamina_configurations (study TEXT, key TEXT, forms TEXT, state TEXT, worker TEXT, attempts INTEGER, "
            "lease_until REAL, score REAL, error TEXT, seconds REAL, recorded INTEGER, PRIMARY KEY (study, key))"
        )
        rows = [
            ("lamina", "a", "{}", "done", "w", 1, 0.0, 0.5, None, 1.0, 1),
            ("lamina", "b", "{}", "running", "w", 1, 0, None, None, None, 0),
        ]
        old.executemany("INSERT INTO lamina_configurations VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows)
    for _ in range(2):
        with opened(Study(url)) as ledger:
            assert [(entry.key, entry.score) for entry in ledger.all()] == [("a", 0.5)]
    with opened(Study(url, name="other")) as ledger:
        assert ledger.all() == []


def test_two_that_end_together_give_optuna_each_trial_once(url: str) -> None:
    net = linears.supernet()
    search(net, linears.score, strategy=Sampled(trials=12), study=url, limit=())
    nets = [linears.supernet() for _ in range(3)]

    def again(net: lamina.Supernet) -> None:
        search(net, linears.score, strategy=Sampled(trials=30), study=url, limit=())

    threads = [threading.Thread(target=again, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = trials_in(url)
    assert len(found) == 30 and set(found.values()) == {1}


def test_a_machine_without_a_thread_to_give_scores_all_the_same(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "lamina-heart":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert len(search(linears.supernet(), linears.score, strategy=Sampled(trials=5), study=url, limit=()).scored) == 5


def test_a_screen_by_scores_stands_in_the_study(url: str) -> None:
    scored: list[int] = []

    def score(model: nn.Module) -> float:
        scored.append(1)
        return linears.score(model)

    where = Study(url, score="worth")
    first = search(
        linears.supernet(), score, strategy=Exhaustive(), screen=Screen("scores", survivors=6), study=where, limit=()
    )
    assert len(scored) == len(first.trials) <= 1 + 4 * 2 + 6
    again = search(
        linears.supernet(), score, strategy=Exhaustive(), screen=Screen("scores", survivors=6), study=where, limit=()
    )
    assert len(scored) == len(first.trials) and again.best == first.best


def test_a_score_costs_a_few_statements_and_optunas_trials_are_written_when_all_are_scored(url: str) -> None:
    """Trial by trial, Optuna's mirror once took more of a search's time than its scores."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    told: list[str] = []
    scored: list[int] = []

    def count(connection: object, cursor: object, statement: str, *_: object) -> None:
        told.append(statement)

    def score(model: nn.Module) -> float:
        scored.append(len(told))
        return linears.score(model)

    event.listen(Engine, "before_cursor_execute", count)
    try:
        search(linears.supernet(), score, strategy=Sampled(trials=60), study=Study(url, score="worth"), limit=())
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    assert len(scored) == 60
    meanwhile = told[scored[0] : scored[-1]]
    assert len(meanwhile) <= 5 * 59
    assert all("lamina_claims" in statement for statement in meanwhile)
