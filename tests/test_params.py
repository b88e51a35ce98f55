"""The YAML: what is right is understood, what is wrong is named."""
import pytest
from hypothesis import given, strategies as st

from conftest import ROOT
from domain_adapt.params import Params, UserError, load_params, set_key, validate

GOOD = dict(run="demo", model="m", corpora={"sec": dict(kind="domain", source="sec", path="filings")}, tokens={"replay": 0},
            merge={"candidates": [dict(name="half", method="linear", weight=0.5)]})


@pytest.mark.parametrize("name", ["quickstart", "tiny"])
def test_the_shipped_runs_are_valid(name):
    assert load_params(ROOT / "params" / f"{name}.yaml").run == name


@pytest.mark.parametrize("change, message", [
    ({"sed": 1}, "params: sed: unknown key; did you mean seed?"),
    ({"train": {"stepz": 3}}, "params: train.stepz: unknown key; did you mean steps?"),
    ({"train": {"layout": {"tpp": 3}}}, "params: train.layout.tpp: unknown key; did you mean tp?"),
    ({"corpora": {"sec": dict(kind="domain", source="sec", path="x", helout=[])}}, "corpora.sec.helout: unknown key; did you mean heldout?"),
    ({"merge": {"candidates": [dict(name="a", method="slerp", t=0.5, wieght=1)]}}, "merge.candidates.0.wieght: unknown key; did you mean weight?"),
    ({"train": {"steps": "many"}}, "params: train.steps: Input should be a valid integer (given: 'many')"),
    ({"train": {"steps": True}}, "params: train.steps: Input should be a valid integer (given: True)"),
    ({"tokens": {"replay": 1.5}}, "params: tokens.replay"),
    ({"train": {"global_batch": 5, "micro_batch": 4}}, "global_batch 5 is not a multiple of micro_batch 4"),
    ({"train": {"steps": 5, "warmup": 5}}, "warmup 5 must be under steps 5"),
    ({"train": {"export_at": [0.5]}}, "export_at must hold 1.0"),
    ({"tokens": {"replay": 0.1}}, "no general corpus is left to replay"),
    ({"corpora": {"w": dict(kind="general", source="general", path="x")}}, "none is of kind domain"),
    ({"corpora": {}}, "params: corpora"),
    ({"run": "../up"}, "params: run"),
    ({"merge": {"candidates": [dict(name="a", method="ties", weight=1.0)]}}, "ties takes density and weight; given: weight"),
    ({"merge": {"candidates": [dict(name="a", method="linear", weight=1.0)] * 2}}, "two candidates are called a"),
    ({"merge": {"candidates": [dict(name="cpt", method="linear", weight=1.0)]}}, "the name cpt is taken"),
    ({"merge": {"candidates": [dict(name="sweep.csv", method="linear", weight=1.0)]}}, "the name sweep.csv is taken"),
])
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(UserError) as e: validate({**GOOD, **change})
    assert message in str(e.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="params: model: missing"): validate({k: v for k, v in GOOD.items() if k != "model"})


@pytest.mark.parametrize("text, message", [
    ("run: a\nrun: b\n", ":2: not valid YAML: key 'run' is given twice"), ("a: [1", "not valid YAML"), ("- 1\n", "must be a mapping"),
    ("run: !!python/object/apply:os.system [true]\n", "not valid YAML"), ("\x00", "not valid YAML"), ("", "must be a mapping"),
])
def test_bad_yaml_is_one_error_with_the_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as e: load_params(path)
    assert str(path) in str(e.value) and message in str(e.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"): load_params(tmp_path / "none.yaml")


def test_numbers_as_yaml_writes_them(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text((ROOT / "params" / "quickstart.yaml").read_text().replace("2.0e-4", "2e-4"))
    assert load_params(path).train.lr == 2e-4


def test_set_changes_one_key():
    p = load_params(ROOT / "params" / "tiny.yaml", ("train.steps=20", "corpora.sec.heldout=['*alder*']", "seed=3"))
    assert (p.train.steps, p.corpora["sec"].heldout, p.seed) == (20, ["*alder*"], 3)
    with pytest.raises(UserError, match="--set train.steps.x=1: steps holds no keys"): set_key({"train": {"steps": 1}}, "train.steps.x=1")
    with pytest.raises(UserError, match="key=value"): set_key({}, "train.steps")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda c: st.lists(c, max_size=2) | st.dictionaries(
    st.sampled_from([*Params.model_fields, "kind", "source", "path", "steps", "candidates", "x"]), c, max_size=3), max_leaves=12))
def test_any_value_is_a_run_or_a_user_error(value):
    try: validate({**GOOD, **value} if isinstance(value, dict) else {**GOOD, "train": value})
    except UserError as e: assert str(e).startswith("params: ")
