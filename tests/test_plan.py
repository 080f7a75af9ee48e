"""A plan as a value: read, printed, edited, saved, loaded and compared, without any network."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import pytest

from lamina import (
    BlockTerm,
    Cost,
    Dense,
    Geometry,
    LowRank,
    Plan,
    PlanError,
    PlannedLayer,
    RankError,
    Ratio,
    Scores,
    SequentialFreezing,
    Setting,
    Timing,
)
from lamina.cli import main
from lamina.curve import Curve
from lamina.files import write_whole
from lamina.folder import Saved
from lamina.forms import Form
from lamina.plan import ExampleShape, FactorMethod, Refined, TensorShape, WholeModel, cost, json_schema
from lamina.values import Use, change

SETTING = Setting("cpu", "a CPU", "float32", "channels_last", 2, "inference", versions="torch 2")
CONV = Geometry("Conv2d", 32, 16, True, (3, 3), (2, 1), "same", (1, 1), "reflect")
LINEAR = Geometry("Linear", 10, 32, True)


def timed(seconds: float) -> Timing:
    return Timing(seconds, seconds / 50, 9, SETTING)


def planned(geometry: Geometry, uses: tuple[Use, ...], form: Form, seconds: tuple[float, float] | None) -> PlannedLayer:
    before, after = cost(geometry, Dense(), uses), cost(geometry, form, uses)
    if seconds:
        before, after = (Cost(c.parameters, c.macs, timed(s)) for c, s in zip((before, after), seconds, strict=True))
    return PlannedLayer(geometry=geometry, uses=uses, form=form, reason="for the test", before=before, after=after)


def a_plan() -> Plan:
    uses = (Use((4, 16, 8, 8), (4, 32, 4, 8), 2, 0.25), Use((1, 16, 8, 8), (1, 32, 4, 8), 1, 0.75))
    return Plan(
        goal=Ratio(2.0),
        rule="Plateau(slack=0.03, gate=3.0)",
        layers={
            "stem": planned(CONV, uses, BlockTerm(None, 12), (0.002, 0.001)),
            "blocks.0.conv": planned(CONV, uses, BlockTerm(8, 9), None),
            "blocks.0.fc": planned(LINEAR, (Use((4, 32), (4, 10)),), Dense(), (0.001, 0.001)),
            "head": planned(LINEAR, (Use((4, 32), (4, 10)),), LowRank(3), (0.001, 0.0005)),
        },
        refused={"attention.out_proj": "reads its weights itself", "grouped": "it has 4 groups"},
        fingerprint="abc",
        setting=SETTING,
        whole=WholeModel(
            before=Cost(1000, 2000, timed(0.01)),
            after=Cost(500, 900, timed(0.006)),
            predicted_s=0.0061,
            speedup=1.66,
            interval=(1.6, 1.7),
        ),
        put_back={"blocks.0.fc": "rank 4 takes 1.20 of the dense layer's time inside the network"},
        examples=(ExampleShape(args=(TensorShape(shape=(4, 16, 8, 8), dtype="float32"),), kwargs={"flag": True}, weight=0.25),),
    )


def test_a_saved_plan_is_loaded_equal(tmp_path: Path) -> None:
    a_plan().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == a_plan()


def test_saving_a_loaded_plan_writes_the_same_bytes(tmp_path: Path) -> None:
    a_plan().save(tmp_path / "one.json")
    Plan.load(str(tmp_path / "one.json")).save(str(tmp_path / "two.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_a_failed_save_leaves_the_old_plan_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    a_plan().save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"other")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_form_set_by_hand_is_obeyed_and_said() -> None:
    changed = a_plan().with_form("head", LowRank(2))
    layer = changed.layers["head"]
    assert (layer.form, layer.decided_by, layer.reason) == (LowRank(2), "hand", "set by hand, not timed")
    assert layer.after == cost(LINEAR, LowRank(2), layer.uses)
    assert layer.after.timing is None
    assert changed.whole is None


def test_setting_a_form_leaves_the_plan_itself_and_its_other_layers_as_they_were() -> None:
    plan = a_plan()
    changed = plan.with_form("head", LowRank(2))
    assert plan == a_plan()
    assert {name: layer for name, layer in changed.layers.items() if name != "head"} == {
        name: layer for name, layer in plan.layers.items() if name != "head"
    }
    assert list(changed.layers) == list(plan.layers)


def test_a_layer_made_dense_by_hand_costs_what_it_did() -> None:
    layer = a_plan().with_form("stem", Dense()).layers["stem"]
    assert layer.after == layer.before
    assert not layer.decomposed


def test_a_misspelt_layer_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(PlanError, match=r"blocks\.0\.cnov: no such layer.*blocks\.0\.conv"):
        a_plan().with_form("blocks.0.cnov", Dense())


def test_a_refused_layer_is_answered_with_the_reason() -> None:
    with pytest.raises(PlanError, match=r"attention\.out_proj: cannot be decomposed: reads its weights itself"):
        a_plan().with_form("attention.out_proj", Dense())


@pytest.mark.parametrize(
    ("name", "form"), [("head", LowRank(11)), ("stem", LowRank(3)), ("head", BlockTerm(2, 2)), ("stem", BlockTerm(17, 3))]
)
def test_a_form_that_does_not_fit_is_refused_by_the_layers_name(name: str, form: Form) -> None:
    with pytest.raises(RankError, match=rf"^{name}: "):
        a_plan().with_form(name, form)


def test_a_plan_does_not_differ_from_itself() -> None:
    assert a_plan().differences(a_plan()) == {}


def test_two_plans_differ_where_their_forms_do() -> None:
    here = a_plan().with_form("head", LowRank(2))
    fewer = a_plan()
    there = fewer.model_copy(update={"layers": {name: layer for name, layer in fewer.layers.items() if name != "stem"}})
    assert here.differences(there) == {"head": ("rank 2", "rank 3"), "stem": ("whole→12", "absent")}
    assert there.differences(here) == {"head": ("rank 3", "rank 2"), "stem": ("absent", "whole→12")}


def test_decomposed_layers_are_those_not_dense() -> None:
    assert list(a_plan().decomposed) == ["stem", "blocks.0.conv", "head"]


def words_of(plan: Plan) -> str:
    """What a plan prints with its reasons, without the breaks of its lines."""
    return " ".join(plan.text(reasons=True).split())


def test_a_printed_plan_holds_every_layer_refusal_and_condition() -> None:
    text = words_of(a_plan())
    for word in [*a_plan().layers, *a_plan().refused, *a_plan().refused.values(), *a_plan().put_back.values(), str(SETTING)]:
        assert word in text
    for word in ("whole→12", "8→9", "rank 3", "dense", "×1.66", "2 → 1 ms", "not timed", "3 of 4 layers decomposed, 2 refused"):
        assert word in text


def test_what_was_achieved_stands_above_the_table_and_the_rest_below() -> None:
    plan = priced({"loss": 0.16}).model_copy(update={"notes": ("a note",), "shares": {"stem": 0.5, "(ReLU)": 0.5}})
    above, table, below = (" ".join(part.split()) for part in plan.text(reasons=True).split("\n\n"))
    *achieved, note = plan.summary()[:6]
    warning, goal, _, times, _ = achieved
    assert above == " ".join([*achieved, note]) and note == "note: a note"
    assert warning.startswith("WARNING") and "3 of 4 layers" in goal and "×1.66 (95 %" in times
    assert table.startswith("layer becomes") and all(name in table for name in plan.layers)
    others = plan.summary()[6:]
    assert below == " ".join(others) and others[:2] == [plan.where(), f"measured on {SETTING}"]


def many(layers: int, **changed: object) -> Plan:
    """A plan of so many layers by turns decomposed, alike in that but for their names and what they lose, and dense."""
    uses = (Use((8, 256, 14, 14), (8, 256, 14, 14)),)
    conv = Geometry("Conv2d", 256, 256, True, (3, 3), (1, 1), (1, 1), (1, 1))
    forms = [BlockTerm(64, 64), Dense(), BlockTerm(None, 96), Dense()]
    each = {
        f"encoder.layers.{n}.block.convolution": planned(conv, uses, forms[n % 4], (0.004, 0.004 / (1 + n % 4))).model_copy(
            update={"loss": 0.001 * n, **changed}
        )
        for n in range(layers)
    }
    return a_plan().model_copy(update={"layers": each, "put_back": dict.fromkeys(list(each)[1:8:2], "it is slower there")})


def test_layers_alike_are_one_line_with_their_number_and_the_most_that_one_of_them_loses() -> None:
    lines = str(many(200)).splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    (both,) = [line for line in lines if "64→64" in line]
    assert "and 49 more" in both and "Conv2d 256→256 3×3" in both and "44% of norm" in both  # 0.196 ** 0.5
    assert not any(" dense " in line for line in lines)
    assert any(line.startswith("left dense, 96 of 200 layers: ") for line in lines)
    assert sum(line.startswith("put back: ") for line in lines) == 4
    assert lines[0].startswith("WARNING") and "lamina show --reasons" in " ".join(lines[-2:])


@pytest.mark.parametrize("width", [60, 80, 100, 132])
def test_a_plan_takes_no_more_columns_than_it_is_given(width: int) -> None:
    text = many(8, nats=0.00123).text(width)
    assert max(map(len, text.splitlines())) <= width
    row = next(line for line in text.splitlines() if "64→64" in line)
    assert row.startswith("enc") and "more" in row and "0.0049 nats" in row.replace("0.0012 nats", "0.0049 nats")
    assert ("parameters" in text.split("\n\n")[1]) == (width == 132)


def test_with_reasons_every_layer_stands_by_itself_with_its_whole_name() -> None:
    text = many(50).text(reasons=True)
    assert all(name in text for name in many(50).layers) and text.count("for the test") == 50


def test_many_layers_put_back_are_one_line() -> None:
    plan = many(50)
    text = " ".join(str(plan.model_copy(update={"put_back": dict.fromkeys(list(plan.layers)[:5], "slow")})).split())
    assert "put back, 5 layers: " in text and "slow" not in text


def test_a_plan_is_one_line_where_it_is_not_printed() -> None:
    assert repr(a_plan()) == "<Plan: ratio 2, 3 of 4 layers decomposed, ×1.66>"
    assert repr(a_plan().with_form("head", LowRank(2))) == "<Plan: ratio 2, 3 of 4 layers decomposed>"


def test_equal_refusals_are_one_line() -> None:
    plan = a_plan().model_copy(update={"refused": {"a": "it has 4 groups", "b": "it has state", "c": "it has 4 groups"}})
    assert plan.summary()[-2:] == ["refused: a, c: it has 4 groups", "refused: b: it has state"]
    assert "3 refused" in plan.summary()[0]


def test_without_a_calibration_what_the_weights_lose_is_told_and_that_nothing_is_known_of_the_answers() -> None:
    plan = a_plan()
    layers = {
        name: layer.model_copy(update={"loss": loss})
        for (name, layer), loss in zip(plan.layers.items(), (0.01, 0.04, 0, 0.0625), strict=True)
    }
    told = "weights: the layers decomposed lose 20% of their norm at the median, 25% at most (head)"
    assert f"{told}; what that does to the answers is not known" in plan.model_copy(update={"layers": layers}).summary()


def test_each_layer_is_printed_with_what_it_was_becomes_and_costs() -> None:
    lines = a_plan().text(reasons=True).split("\n")
    found = {line.split("  ")[0]: number for number, line in enumerate(lines)}
    rows = {
        name: [cell.strip() for line in lines[found[name] : found[name] + 2] for cell in line.split("  ") if cell.strip()]
        for name in a_plan().layers
    }
    layers = a_plan().layers
    assert rows["head"][1:] == ["rank 3", "330 → 136", "1.32 → 0.544 k", "1 → 0.5 ms", "Linear 32→10", "for the test"]
    assert rows["blocks.0.fc"][1:] == ["dense", "330", "1.32 k", "1 ms", "Linear 32→10", "for the test"]
    assert rows["blocks.0.conv"][4] == "not timed"
    assert rows["stem"][2] == f"{layers['stem'].before.parameters / 1e3:.3g} → {layers['stem'].after.parameters / 1e3:.3g} k"


@pytest.mark.parametrize("name", ["head", "layer4.0.downsample.0", "encoder.layers.encoder_layer_11.self_attention.out_proj"])
def test_a_plan_prints_in_80_columns_however_long_its_reasons_and_names_are(name: str) -> None:
    uses = (Use((8, 256, 14, 14), (8, 512, 7, 7)),)
    conv = Geometry("Conv2d", 512, 256, True, (3, 3), (2, 2), (1, 1), (1, 1))
    layer = planned(conv, uses, BlockTerm(128, 256, 32), (0.01234, 0.001234))
    reason = "no rank is faster: the best candidate, 128→256 in 32 groups, takes 1.03 of the dense time " * 2
    plan = a_plan()
    plan = plan.model_copy(update={"layers": plan.layers | {name: layer.model_copy(update={"reason": reason.strip()})}})
    assert max(map(len, plan.text(reasons=True).split("\n"))) <= 80 >= max(map(len, str(plan).split("\n")))
    for word in (name, "128→256 in 32 groups", "12.3 → 1.23 ms", str(conv), reason.strip(), "1.18 → 0.174 M"):
        assert word in words_of(plan)


def test_a_layer_set_by_hand_is_printed_with_its_old_time_alone() -> None:
    assert "1 ms → not timed" in str(a_plan().with_form("head", LowRank(2)))


def test_a_form_that_costs_more_is_printed_with_both_costs() -> None:
    assert "330 → 430" in words_of(a_plan().with_form("head", LowRank(10)))


def test_the_summary_counts_the_network_where_it_was_measured_and_else_the_planned_layers() -> None:
    plan = a_plan()
    assert "network: parameters 1 → 0.5 k, MACs 2 → 0.9 k" in plan.summary()
    parts = [
        Cost(sum(c.parameters for c in costs), sum(c.macs for c in costs))
        for costs in ([layer.before for layer in plan.layers.values()], [layer.after for layer in plan.layers.values()])
    ]
    told = [change(getattr(parts[0], name), getattr(parts[1], name)) for name in ("parameters", "macs")]
    alone = plan.model_copy(update={"whole": None}).summary()
    assert f"these layers: parameters {told[0]}, MACs {told[1]}" in alone
    assert not any(line.startswith(("network", "whole")) for line in alone)


def test_each_decomposed_layer_is_printed_with_what_it_loses() -> None:
    layers = a_plan().layers
    losses = {"stem": {"loss": 0.04}, "head": {"loss": 0.09, "nats": 0.0123}, "blocks.0.fc": {"loss": 0.25, "nats": 0.5}}
    layers = {name: layer.model_copy(update=losses.get(name, {})) for name, layer in layers.items()}
    told = {name: layer.lost for name, layer in layers.items()}
    assert told == {"stem": "loses 20% of its norm", "head": "loses 0.012 nats", "blocks.0.fc": "", "blocks.0.conv": ""}
    assert "loses 20% of its norm" in words_of(a_plan().model_copy(update={"layers": layers}))


def priced(each: dict[str, object], **plan: object) -> Plan:
    """The plan with this of each decomposed layer, and perhaps more."""
    layers = {n: layer.model_copy(update=each if layer.decomposed else {}) for n, layer in a_plan().layers.items()}
    return a_plan().model_copy(update={"layers": layers, **plan})


CALIBRATED = FactorMethod(calibration="0123456789")
REFINED = FactorMethod(calibration="0123456789", refined=(Refined(steps=3, seed=0, data="x", before=0.2, after=0.01),))
MUCH_LOST = {"loss": 0.16, "nats": 0.02}
"""Of one layer little, of three together above the limit."""
SCORES = Scores(before=0.9, after=0.8)
WARNED = {
    "weights": (priced({"loss": 0.16}), "3 of 3 layers decomposed lose more than 0.3 of their norm"),
    "outputs": (priced({"loss": 0.16, "loss_of": "output"}, factors=CALIBRATED), "lose more than 0.3 of their outputs"),
    "nats": (priced(MUCH_LOST, factors=CALIBRATED), "the answers are predicted to lose 0.06 nats an item, and 0.045 is much"),
    "nats, scored": (priced(MUCH_LOST, factors=CALIBRATED, scores=SCORES), "predicted to lose 0.06 nats"),
    "nats, one layer set by hand": (
        priced({"loss": 0.16, "nats": 0.05}, factors=CALIBRATED).with_form("head", LowRank(2)),
        "predicted to lose 0.1 nats an item and more",
    ),
}
QUIET = {
    "little of the weights": priced({"loss": 0.04}),
    "few nats, whatever they are of the layers": priced({"loss": 0.9, "nats": 0.01}, factors=CALIBRATED),
    "a score tells more than the weights": priced({"loss": 0.16}, scores=SCORES),
    "won back by refining": priced(MUCH_LOST, factors=REFINED),
    "nothing known": a_plan(),
}


@pytest.mark.parametrize(("plan", "says"), WARNED.values(), ids=WARNED)
def test_where_the_answers_are_likely_others_a_warning_stands_first(plan: Plan, says: str) -> None:
    assert plan.warning.startswith("WARNING: ") and says in plan.warning and "measure how accurate" in plan.warning
    assert plan.summary()[0] == plan.warning and words_of(plan).startswith(plan.warning)
    assert words_of(plan).count("WARNING") == 1 and max(map(len, str(plan).splitlines())) <= 80


@pytest.mark.parametrize("plan", QUIET.values(), ids=QUIET)
def test_elsewhere_there_is_no_warning(plan: Plan) -> None:
    assert plan.warning == "" and "WARNING" not in str(plan) and plan.summary()[0].startswith("ratio 2")


def test_what_layers_lose_of_their_outputs_is_called_that_and_no_nats() -> None:
    plan = priced({"loss": 0.04, "loss_of": "output"}, factors=CALIBRATED)
    told = "outputs of layers: the layers decomposed lose 20% of their outputs at the median, 20% at most (stem)"
    assert f"{told}, by calibration 01234567; what that does to the answers is not known" in plan.summary()
    assert "loses 20% of its output" in words_of(plan) and "nats" not in str(plan)
    assert plan.with_form("stem", BlockTerm(2, 2)).layers["stem"].loss_of == "weight"


def test_the_predicted_loss_is_the_sum_over_layers_and_not_known_where_one_of_them_has_none() -> None:
    plan = a_plan()
    priced = {
        name: layer.model_copy(update={"nats": 0.25 if layer.decomposed else None}) for name, layer in plan.layers.items()
    }
    factors = plan.factors.model_copy(update={"calibration": "0123456789"})
    plan = plan.model_copy(update={"layers": priced, "factors": factors})
    assert "predicted loss: 0.75 nats an item, by calibration 01234567" in plan.summary()
    edited = plan.with_form("head", LowRank(2))
    assert edited.nats is None and "predicted loss: not known, by calibration 01234567" in edited.summary()
    dense = edited.with_form("head", Dense())
    assert "predicted loss: 0.5 nats an item, by calibration 01234567" in dense.summary()


def test_the_predicted_loss_is_the_sum_of_the_layers_and_what_the_curve_tells_of_losing_them_at_once() -> None:
    plan = a_plan()
    layers = {n: layer.model_copy(update={"nats": 0.25 if layer.decomposed else None}) for n, layer in plan.layers.items()}
    factors, curve = (
        plan.factors.model_copy(update={"calibration": "0123456789"}),
        Curve(points=((0.25, 0.25), (0.5, 1.0))),
    )  # squared
    plan = plan.model_copy(update={"layers": layers, "factors": factors, "together": curve})
    assert plan.nats == pytest.approx(9.75) and "predicted loss: 9.7 nats an item, by calibration 01234567" in plan.summary()
    assert plan.with_form("head", Dense()).nats == pytest.approx(1.5)
    assert all(layer.lost == "" or "0.25 nats" in layer.lost for layer in plan.with_form("head", Dense()).layers.values())


def test_a_freezing_schedule_is_told_with_the_goal() -> None:
    plan = a_plan().model_copy(update={"mode": "training", "freezing": SequentialFreezing(period=2)})
    assert f"for a training step under {SequentialFreezing(period=2)}: 3 of 4" in plan.summary()[0]
    assert "training step" not in a_plan().summary()[0]


def test_a_plan_file_is_text_that_ends_its_last_line(tmp_path: Path) -> None:
    a_plan().save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text().endswith("}\n")


def test_what_a_file_says_of_weights_beside_it_is_no_part_of_the_plan(tmp_path: Path) -> None:
    saved = Saved(weights=f"model-{'0' * 16}.safetensors", sha256="a", document="b")
    a_plan().model_copy(update={"saved": saved}).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == a_plan()
    assert Plan.read(tmp_path / "plan.json").saved == saved


def test_a_plan_without_layers_prints_too() -> None:
    empty = Plan(goal=Ratio(2), rule="AtRatio()", layers={}, fingerprint="abc")
    assert "0 of 0 layers decomposed" in str(empty)


def test_a_network_that_is_itself_one_layer_is_called_the_network() -> None:
    plan = Plan(goal=Ratio(2), rule="AtRatio()", layers={"": planned(LINEAR, (), LowRank(3), None)}, fingerprint="abc")
    assert "(the network)" in str(plan)


def test_a_plan_and_its_layers_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        a_plan().rule = "other"
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        a_plan().layers["head"].form = Dense()


def test_macs_of_several_uses_are_added_by_their_weights() -> None:
    uses = (Use((4, 32), (4, 10), 2, 0.25), Use((1, 32), (1, 10), 1, 0.75))
    assert cost(LINEAR, Dense(), uses).macs == round(330 * (0.25 * 2 * 4 + 0.75 * 1))


def edited(change: dict[str, object], layer: dict[str, object] | None = None) -> str:
    content = json.loads(a_plan().model_dump_json()) | change
    if layer:
        content["layers"]["head"] |= layer
    return json.dumps(content)


BROKEN = {
    "empty": ("", "not a readable plan"),
    "not JSON": ("lamina", "not a readable plan"),
    "a list": ("[1, 2]", "no format number"),
    "no format": ('{"goal": 3}', "no format number"),
    "format as text": (edited({"format": "1"}), "no format number"),
    "format 0": (edited({"format": 0}), "format"),
    "newer": (edited({"format": 3}), "newer lamina.*upgrade"),
    "unknown field": (edited({"colour": "red"}), "colour"),
    "missing field": (
        json.dumps({"format": 1, "goal": {"value": 2, "goal": "ratio"}, "rule": "", "layers": {}}),
        "fingerprint",
    ),
    "ratio below 1": (edited({"goal": {"value": 0.5, "goal": "ratio"}}), "goal"),
    "unknown form": (edited({}, {"form": {"form": "magic"}}), "layers.head.form"),
    "rank 0": (edited({}, {"form": {"form": "low_rank", "rank": 0}}), "layers.head.form"),
    "rank above full": (edited({}, {"form": {"form": "low_rank", "rank": 11}}), "head: rank 11 is not between 1 and 10"),
    "form of another layer": (
        edited({}, {"form": {"form": "block_term", "rank_in": 2, "rank_out": 2, "groups": 1}}),
        "head: BlockTerm is for",
    ),
    "geometry of text": (edited({}, {"geometry": "Linear"}), "layers.head.geometry"),
}


@pytest.mark.parametrize(("text", "says"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_plan_is_refused_in_one_line_that_names_it(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == text


def put(path: str, value: object) -> str:
    """The plan's file with another value at a path of names and positions."""
    content = json.loads(a_plan().model_dump_json())
    *way, last = path.split(".")
    place = content
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(content)


# Where in the file, what stands there instead, and what is said beside the place.
NONSENSE = {
    "true for the format": ("format", True, "no format number"),
    "1.0 for the format": ("format", 1.0, "no format number"),
    "a negative format": ("format", -1, "format: Input should be 1 or 2"),
    "a ratio that is no number": ("goal.value", float("nan"), "goal.ratio.value: Input should be a finite number"),
    "a ratio as text": ("goal.value", "2", "goal.ratio.value: Input should be a valid number"),
    "an unknown goal": ("goal.goal", "magic", "goal: .*ratio"),
    "rank as text": ("layers.head.form.rank", "3", "low_rank.rank: Input should be a valid integer"),
    "rank as a float": ("layers.head.form.rank", 3.0, "low_rank.rank: Input should be a valid integer"),
    "rank as truth": ("layers.head.form.rank", True, "low_rank.rank: Input should be a valid integer"),
    "a huge rank": ("layers.head.form.rank", 10**400, "head: rank 10+ is not between 1 and 10"),
    "a field too many in a form": ("layers.head.form.colour", 1, "low_rank.colour"),
    "an unknown type": ("layers.head.geometry.type", "Evil", "geometry.type: Input should be 'Linear', "),
    "no output channels": ("layers.head.geometry.out_channels", 0, "geometry.out_channels: .*greater than or equal to 1"),
    "negative output channels": ("layers.head.geometry.out_channels", -8, "geometry.out_channels: .*greater"),
    "no input channels": ("layers.head.geometry.in_channels", 0, "geometry.in_channels: .*greater than or equal to 1"),
    "channels as text": ("layers.head.geometry.in_channels", "32", "geometry.in_channels: .*valid integer"),
    "channels as a float": ("layers.head.geometry.in_channels", 32.0, "geometry.in_channels: .*valid integer"),
    "a bias of 1": ("layers.head.geometry.bias", 1, "geometry.bias: Input should be a valid boolean"),
    "huge channels": ("layers.head.geometry.in_channels", 2**63, "geometry.in_channels: Input should be less"),
    "huge channels together": ("layers.head.geometry.in_channels", 2**62, "geometry: Value error, no tensor has so many"),
    "a huge kernel": ("layers.stem.geometry.kernel", [2**70, 3], "geometry.kernel.0: Input should be less"),
    "a kernel of nothing": ("layers.stem.geometry.kernel", [0, 3], "geometry.kernel.0: .*greater than or equal to 1"),
    "a kernel as text": ("layers.stem.geometry.kernel", "33", "geometry.kernel: Input should be a valid array"),
    "a kernel of a linear layer": ("layers.head.geometry.kernel", [1], r"geometry: Value error, kernel \(1,\) of a Linear"),
    "a kernel of one side": ("layers.stem.geometry.kernel", [3], r"kernel \(3,\) of a Conv2d, whose kernel has 2 sides"),
    "a kernel of three sides": ("layers.stem.geometry.kernel", [3, 3, 3], "kernel .* of a Conv2d"),
    "a stride of one side": ("layers.stem.geometry.stride", [1], r"stride \(1,\) of a Conv2d"),
    "a stride of 0": ("layers.stem.geometry.stride", [1, 0], "geometry.stride.1: .*greater than or equal to 1"),
    "a dilation of one side": ("layers.stem.geometry.dilation", [1], r"dilation \(1,\) of a Conv2d"),
    "a dilation of 0": ("layers.stem.geometry.dilation", [0, 1], "geometry.dilation.0: .*greater than or equal to 1"),
    "a padding of one side": ("layers.stem.geometry.padding", [1], r"padding \(1,\) of a Conv2d"),
    "a negative padding": ("layers.stem.geometry.padding", [-1, 1], "geometry.padding.*greater than or equal to 0"),
    "an unknown padding": ("layers.stem.geometry.padding", "full", "geometry.padding"),
    "a padding of a linear layer": ("layers.head.geometry.padding", "same", "padding 'same' of a Linear"),
    "an unknown padding mode": (
        "layers.stem.geometry.padding_mode",
        "wrap",
        "geometry.padding_mode: Input should be 'zeros', ",
    ),
    "an infinite weight": ("layers.stem.uses.0.weight", float("inf"), "uses.0.weight: Input should be a finite number"),
    "a weight that is no number": ("layers.stem.uses.0.weight", float("nan"), "uses.0.weight: Input should be a finite"),
    "no weight": ("layers.stem.uses.0.weight", 0.0, "uses.0.weight: Input should be greater than 0"),
    "a negative weight": ("layers.stem.uses.0.weight", -0.5, "uses.0.weight: Input should be greater than 0"),
    "a weight above all": ("layers.stem.uses.0.weight", 1e308, "uses.0.weight: Input should be less than or equal to 1"),
    "no calls": ("layers.stem.uses.0.calls", 0, "uses.0.calls: .*greater than or equal to 1"),
    "a negative side": ("layers.stem.uses.0.input_shape", [-4, 16, 8, 8], "uses.0.input_shape.0: .*greater than or equal to 0"),
    "a huge input": ("layers.stem.uses.0.input_shape", [2**40, 2**40], "uses.0.input_shape: .*so many elements"),
    "a huge output": ("layers.stem.uses.0.output_shape", [2**62] * 60, "uses.0.output_shape: .*so many elements"),
    "endless sides": ("layers.stem.uses.0.output_shape", [1] * 65, "uses.0.output_shape: .*at most 64"),
    "an input in integers": ("layers.stem.uses.0.input_dtype", "int64", "uses.0.input_dtype: Input should be 'float64', "),
    "an autocast to nothing": ("layers.stem.uses.0.autocast", "on", "uses.0.autocast"),
    "negative parameters": ("layers.head.before.parameters", -5, "before.parameters: .*greater than or equal to 0"),
    "negative MACs": ("layers.head.after.macs", -5, "after.macs: .*greater than or equal to 0"),
    "huge parameters": ("layers.head.after.parameters", 10**400, "after.parameters: Input should be less"),
    "an infinite time": ("layers.head.before.timing.median_s", float("inf"), "timing.median_s: Input should be a finite"),
    "a negative spread": ("layers.head.before.timing.mad_s", -1e-9, "timing.mad_s: .*greater than or equal to 0"),
    "negative runs": ("layers.head.before.timing.repeats", -1, "timing.repeats: .*greater than or equal to 0"),
    "no threads": ("setting.threads", 0, "setting.threads: .*greater than or equal to 1"),
    "no speed": ("whole.speedup", 0, "whole.speedup: .*greater than 0"),
    "a negative interval": ("whole.interval", [-1, 2], "whole.interval.0: .*greater than 0"),
    "half an interval": ("whole.interval", [1], "whole.interval"),
    "an infinite prediction": ("whole.predicted_s", float("inf"), "whole.predicted_s: Input should be a finite number"),
    "a stranger's decision": (
        "layers.head.decided_by",
        "magic",
        "decided_by: Input should be 'rule', 'hand' or 'never_slower'",
    ),
    "an unknown mode": ("mode", "both", "mode: Input should be 'inference' or 'training'"),
    "a negative side of an example": ("examples.0.args.0.shape", [-1], "args.0.tensor.shape.0: .*greater than or equal to 0"),
    "an example that weighs nothing": ("examples.0.weight", 0, "examples.0.weight: Input should be greater than 0"),
    "an example of another kind": ("examples.0.args.0", {"kind": "set", "items": []}, "args.0.list.kind: .*'list' or 'tuple'"),
    "half a range": ("examples.0.args.0.low", 1.0, "args.0.tensor: .*no values lie between 1.0 and None"),
    "an unknown way to find factors": ("factors.low_rank", "magic", "factors.low_rank: Input should be 'svd'"),
}


@pytest.mark.parametrize(("path", "value", "says"), NONSENSE.values(), ids=NONSENSE)
def test_a_value_that_makes_no_sense_is_refused_in_a_line_that_names_it(
    path: str, value: object, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(put(path, value))
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(file)
    assert str(caught.value).startswith(str(file)) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layers.head.geometry", {"type": "Conv1D", "out_channels": 10, "in_channels": 32, "bias": True}),
        ("layers.stem.geometry.padding", [0, 5]),
        ("layers.stem.geometry.padding", "valid"),
        ("layers.stem.uses.0.input_shape", [0, 16, 8, 8]),
        ("layers.stem.uses.0.input_dtype", "bfloat16"),
        ("layers.stem.uses.0.autocast", "float16"),
        ("layers.head.before.timing.mad_s", 0),
        ("whole.predicted_s", -1e-5),  # the layers' gains, taken alone, may sum to more than the whole network's time
        ("goal.value", 3),
    ],
    ids=str,
)
def test_a_value_at_the_edge_of_what_makes_sense_is_read(path: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(put(path, value))
    again = json.loads(Plan.load(tmp_path / "plan.json").model_dump_json())
    for step in path.split("."):
        again = again[int(step) if isinstance(again, list) else step]
    assert again == value or (isinstance(value, dict) and value.items() <= again.items())


def texts() -> dict[str, str | bytes]:
    good = a_plan().model_dump_json(indent=1)
    return {
        "deep": "[" * 100_000,
        "deep and closed": '{"format":1,"goal":' + "[" * 200_000 + "]" * 200_000 + "}",
        "5,000 digits": good.replace('"rank": 3', '"rank": ' + "9" * 5000),
        "a layer twice": good.replace('"stem": {', '"stem": {}, "stem": {'),
        "the format twice": good.replace('"format": 1', '"format": 2, "format": 1'),
        "UTF-16": good.encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + good.encode(),
    }


@pytest.mark.parametrize("damage", texts())
def test_a_file_that_lies_about_being_json_is_refused_in_a_line(damage: str, tmp_path: Path) -> None:
    path, text = tmp_path / "plan.json", texts()[damage]
    assert text != a_plan().model_dump_json(indent=1)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match="not a readable plan") as caught:
        Plan.load(path)
    assert str(caught.value).isprintable()


def test_a_layer_with_a_line_break_in_its_name_is_still_named_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    content = json.loads(put("layers.head.form.rank", 11))
    content["layers"]["he\nad"] = content["layers"].pop("head")
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"he\\nad: rank 11 is not between") as caught:
        Plan.load(path)
    assert str(caught.value).isprintable()


def test_a_path_with_a_nul_can_be_neither_read_nor_written() -> None:
    with pytest.raises(PlanError, match=r"a\\x00b: not a readable plan") as caught:
        Plan.load("a\0b")
    assert str(caught.value).isprintable()
    with pytest.raises(PlanError, match=r"a\\x00b: the plan cannot be written") as caught:
        a_plan().save("a\0b")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}"], ids=["deep", "5,000 digits"])
def test_on_the_command_line_a_malformed_plan_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(text)
    code = main(["show", str(tmp_path / "plan.json")])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {tmp_path / 'plan.json'}: not a readable plan")


def test_what_is_read_can_be_worked_with(tmp_path: Path) -> None:
    """Nothing that a file may say makes a plan that cannot be printed, costed or written."""
    content = json.loads(a_plan().model_dump_json())
    most = 2**63 - 1
    head = content["layers"]["head"]
    head["geometry"] |= {"out_channels": most // 32}
    head["uses"] = [{"input_shape": [most], "output_shape": [most], "calls": most, "weight": 1.0}]
    head["before"] |= {"parameters": most, "macs": most}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = Plan.load(tmp_path / "plan.json").with_form("head", LowRank(1))
    assert "rank 1" in str(plan) and plan.summary()


def test_a_plan_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    a_plan().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match="not a readable plan"):
            Plan.load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 40], ids=["no UTF-8", "zeros"])
def test_a_binary_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match="not a readable plan"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match="not a readable plan"):
            Plan.load(path)


def test_the_schema_asks_for_what_a_plan_must_have_and_allows_nothing_more() -> None:
    schema = json_schema()
    assert {"goal", "rule", "layers", "fingerprint"} <= set(schema["required"])
    assert schema["additionalProperties"] is False
    assert schema["properties"]["format"]["enum"] == [1, 2]


def test_a_schedule_in_a_plan_for_inference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = a_plan().model_copy(update={"mode": "training", "freezing": SequentialFreezing(period=2)})
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mode": "inference"}))
    with pytest.raises(PlanError, match="freezing: a schedule belongs to a plan for training"):
        Plan.load(path)


def test_a_schedule_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    content = json.loads(a_plan().model_dump_json()) | {"mode": "training", "freezing": {"freezing": "sequential", "period": 0}}
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"freezing.*period is 0"):
        Plan.load(path)


def test_a_plan_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match=r"file/plan\.json: the plan cannot be written"):
        a_plan().save(tmp_path / "file" / "plan.json")
