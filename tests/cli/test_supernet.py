"""`lamina supernet`, `train`, `search` and `extract`: from a network to the best of its forms, in four commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lamina.artifact import load
from lamina.cli.supernet import parse_sizes
from lamina.supernet.files import load_supernet, read_configuration

SUPPORT = """
import torch
import torch.nn.functional as F
import lamina

def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 4, 6, 6, generator=generator), torch.randint(0, 8, (4,), generator=generator)) for _ in range(3)]

calls = []

def score(model):
    calls.append(1)
    return -sum(float(F.cross_entropy(model(x), y)) for x, y in loader())

many = lamina.Scored(loader(), lambda output, target: -F.cross_entropy(output, target))
number = 3
"""


NORMED = """
import torch
from torch import nn

def net():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(4, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 8),
    )

def images():
    torch.manual_seed(3)
    return [torch.randn(16, 4, 6, 6)]
"""


@pytest.fixture
def support(here: Path):
    (here / "my_task.py").write_text(SUPPORT)
    yield
    sys.modules.pop("my_task", None)


LOSS = "torch.nn.functional:cross_entropy"


@pytest.fixture
def net_folder(run, here: Path, support: None) -> Path:
    words = ("--input", "2,4,6,6", "--group-sizes", "1,4,12,24", "--skip", "0")
    found = run("supernet", "small_nets:net", *words, "-o", "NET", "--json").json
    assert (found["series"], found["configurations"]) == (1, 4)
    assert set(found["left_dense"]) == {"0", "5", "7"}
    return here / "NET"


def test_the_four_commands_lead_from_a_network_to_a_saved_one(run, here: Path, net_folder: Path) -> None:
    trained = run(
        "train", "NET", "--data", "my_task:loader", "--epochs", "2", "-o", "TRAINED", "--loss", LOSS, "--teacher", "--json"
    ).json
    assert trained["training"]["steps"] == 6
    words = ("search", "TRAINED", "--macs", "1e9", "--score", "my_task:score", "--strategy", "exhaustive")
    found = run(*words, "--plot", "plot.png", "--json").json if _can_plot() else run(*words, "--json").json
    assert (found["scored"], found["failed"]) == (4, 0)
    assert read_configuration(here / "TRAINED" / "best.json") == read_configuration(_written(here, found["config"]))
    saved = run("extract", "TRAINED", "-o", "out", "--json").json
    assert (saved["decomposed"], saved["layers"]) == (1, 4)
    from small_nets import net  # type: ignore[import-not-found]

    small, supernet = load(net(), here / "out").eval(), load_supernet(net().eval(), here / "TRAINED")
    supernet.set_active(read_configuration(here / "TRAINED" / "best.json"))
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(small(x), supernet(x))
    assert run("bench", "small_nets:net", "out", "--input", "2,4,6,6", "--seconds", "0.001").code == 0


def _net() -> nn.Module:
    from small_nets import net

    found: nn.Module = net()
    return found.eval()


def _can_plot() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _written(here: Path, config: object) -> Path:
    path = here / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_a_second_search_scores_nothing_again(run, here: Path, net_folder: Path) -> None:
    words = ("search", "NET", "--score", "my_task:score", "--strategy", "exhaustive", "--no-limit", "--json")
    first = run(*words).json
    import my_task  # type: ignore[import-not-found]

    assert len(my_task.calls) == 4
    again = run(*words).json
    assert len(my_task.calls) == 4
    assert (again["score"], again["config"]) == (first["score"], first["config"])
    assert (here / "NET.db").exists()


def test_a_supernet_that_was_trained_on_is_searched_in_a_study_of_its_own(run, net_folder: Path) -> None:
    words = ("search", "NET", "--score", "my_task:score", "--strategy", "exhaustive", "--no-limit", "--json")
    first = run(*words).json
    run("train", "NET", "--data", "my_task:loader", "--epochs", "2", "--loss", LOSS)
    import my_task  # type: ignore[import-not-found]

    assert len(my_task.calls) == 4
    again = run(*words).json
    assert len(my_task.calls) == 8 and again["score"] != first["score"]


@pytest.mark.parametrize("strategy", ["solved", "breadth-first", "random", "tpe", "nsga2"])
def test_every_strategy_has_a_name(run, net_folder: Path, strategy: str) -> None:
    words = ("search", "NET", "--score", "my_task:many", "--strategy", strategy, "--trials", "3", "--study", "sqlite:///s.db")
    assert run(*words, "--no-limit", "--json").json["scored"] >= 2


def test_a_network_within_a_budget_is_taken_out_with_no_search(run, here: Path, net_folder: Path) -> None:
    space = load_supernet(_net(), net_folder).space
    middle = sorted(space.cost(config).macs for config in space)[1]
    run("extract", "NET", "-o", "out", "--macs", str(middle))
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["whole"]["after"]["macs"] <= middle and plan["goal"] == {"goal": "macs", "value": middle}


@pytest.mark.parametrize("by", ["errors", "scores"])
def test_a_limit_on_time_is_measured(run, net_folder: Path, by: str) -> None:
    screen = ("--screen", "2", "--screen-by", by)
    found = run("search", "NET", "--score", "my_task:score", "--milliseconds", "60000", *screen, "--strategy", "exhaustive")
    assert found.code == 0, found.err
    (line,) = (line for line in found.out.splitlines() if line.startswith("whole network: "))
    assert "×" in line  # behind a warning where the outputs of so small a network change much
    run("extract", "NET", "-o", "out")
    assert json.loads(Path("out/plan.json").read_text())["whole"]["speedup"] > 0


def test_batch_norms_of_each_step_are_estimated_behind_the_training(run, here: Path, support: None) -> None:
    (here / "normed.py").write_text(NORMED)
    run("supernet", "normed:net", "--input", "2,4,6,6", "--group-sizes", "1,4,12,24", "--skip", "0", "-o", "NET")
    words = (
        "train",
        "NET",
        "--data",
        "my_task:loader",
        "--epochs",
        "1",
        "--recipe",
        "order",
        "--rate",
        "0.001",
        "--loss",
        LOSS,
    )
    assert run(*words, "--recalibrate", "normed:images").code == 0
    run("extract", "NET", "--macs", "1e9", "-o", "kept")
    run("extract", "NET", "--macs", "1e9", "--recalibrate", "normed:images", "-o", "anew")
    from normed import images, net  # type: ignore[import-not-found]

    kept, anew = (load(net(), here / folder).eval() for folder in ("kept", "anew"))
    (x,) = images()
    assert torch.equal(kept(x), anew(x)) and not torch.equal(kept[1].running_mean, net()[1].running_mean)
    sys.modules.pop("normed", None)


def test_training_goes_on_from_its_checkpoints(run, net_folder: Path) -> None:
    kept = ("--epochs", "2", "--checkpoints", "kept", "--recipe", "faithful", "--loss", LOSS, "--json")
    words = ("train", "NET", "--data", "my_task:loader", *kept)
    first = run(*words, "-o", "one").json["training"]
    again = run(*words, "-o", "two").json["training"]
    assert first["resumed_at"] is None
    assert again["resumed_at"] == first["steps"] == 6
    one, two = (load_file(next(Path(folder).glob("model-*"))) for folder in ("one", "two"))
    assert all(torch.equal(one[name], value) for name, value in two.items())


WRONG: dict[str, tuple[tuple[str, ...], int, str]] = {
    "sizes": (("supernet", "small_nets:net", "--input", "2,4,6,6", "--group-sizes", "1,x", "-o", "N"), 2, "write group sizes"),
    "sizes that do not nest": (
        ("supernet", "small_nets:net", "--input", "2,4,6,6", "--group-sizes", "4,6", "-o", "N"),
        1,
        "group sizes 4 and 6 do not nest",
    ),
    "another folder": (
        ("supernet", "small_nets:net", "--input", "2,4,6,6", "--group-sizes", "1,4", "-o", "."),
        1,
        "holds other files",
    ),
    "no supernet": (("search", "nowhere", "--score", "my_task:score"), 1, "nowhere is not a saved supernet"),
    "no score": (("search", "NET", "--score", "my_task:scor"), 1, "has no scor; did you mean score"),
    "a number": (("search", "NET", "--score", "my_task:number"), 1, "it must be a function from a network to a number"),
    "a limit below": (
        ("search", "NET", "--score", "my_task:score", "--macs", "1"),
        1,
        "no configuration is within 1 MACs",
    ),
    "a limit of nothing": (
        ("search", "NET", "--score", "my_task:score", "--milliseconds", "0"),
        1,
        "a limit of 0.0 is not possible",
    ),
    "no study": (("search", "NET", "--score", "my_task:score", "--study", "sqlite:////no/such/s.db"), 1, "cannot be reached"),
    "a share of no answers": (("train", "NET", "--data", "my_task:loader", "--distill-weight", "0.3"), 2, "--teacher"),
    "checkpoints nowhere": (("train", "NET", "--data", "my_task:loader", "--every", "2"), 2, "--checkpoints"),
    "a folder of others before the training": (
        ("train", "NET", "--data", "my_task:loader", "--epochs", "1000000", "-o", "."),
        1,
        "holds other files",
    ),
    "nothing found yet": (("extract", "NET", "-o", "out"), 1, "NET has no best.json: name a budget, run lamina search"),
    "a budget and a configuration": (("extract", "NET", "-o", "out", "--config", "c.json", "--macs", "9"), 2, "not go with"),
    "a budget below": (("extract", "NET", "-o", "out", "--macs", "1"), 1, "no configuration is within 1 MACs"),
    "a limit and none": (("search", "NET", "--score", "my_task:score", "--macs", "9", "--no-limit"), 2, "goes with no limit"),
    "nothing to learn from": (("train", "NET", "--data", "my_task:loader"), 1, "there is nothing to learn from"),
    "no configuration": (("extract", "NET", "-o", "out", "--config", "my_task.py"), 1, "is no readable configuration"),
    "another network": (
        ("extract", "NET", "-o", "out", "--config", "c.json", "--model", "small_nets:wider"),
        1,
        "another network",
    ),
}


@pytest.mark.parametrize(("words", "code", "says"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_line(run, here: Path, net_folder: Path, words: tuple[str, ...], code: int, says: str) -> None:
    (here / "c.json").write_text("{}")
    assert says in run(*words).complaint(code)


def test_sizes_are_read_as_they_are_written() -> None:
    assert parse_sizes("1,4,16,32") == (1, 4, 16, 32)
