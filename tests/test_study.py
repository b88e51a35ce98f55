"""A study: what its YAML may say, what its arms share, what its tables and its page say; killed, failing, in parallel, on Slurm."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import lxml.html
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from test_browser import SIZES, chromium, opened    # noqa: F401
from domain_adapt import law, stats
from domain_adapt.arms import ENOUGH, Arm, Grid, Law, Study, is_study, load_study, rules, sequences
from domain_adapt.contrasts import Result, arms_table, contrasts, curve, effects, flops, law_points, law_tables, marginal, merged, ordered, process_seconds, seen
from domain_adapt.params import UserError, load_params
from domain_adapt.summary import measures
from domain_adapt.runs import Run
from domain_adapt.study import problems, shared
from domain_adapt.study_page import (Found, _caution, _checkpoints, _foretold, _law, _merge_better, _methods, _outside, _recommended, _scale, _setting, _synergistic, build,
                                     words)

PRESETS = sorted((ROOT / "params/studies").glob("*.yaml"))
QUICK = load_params(ROOT / "params/quickstart.yaml")
TINY = load_params(ROOT / "params/tiny.yaml")
SMALL = {"tokens.sequence_length": 32, "train.steps": 4, "train.warmup": 1, "train.export_at": [1.0], "train.schedule": "constant",
         "train.validation": {"every": 2, "tokens": 256}, "merge.candidates": [{"name": "half", "method": "linear", "weight": 0.5}], "merge.grid": [],
         "merge.search": None, "merge.landscape": {}, "merge.max_tokens": 512, "merge.select": {"max_forgetting": 10, "keep": 1},
         "evaluate.suites": {}, "evaluate.chat": None, "evaluate.perplexity": {"max_tokens": 1024, "block": 64}}
TWO = [dict(name="none", set={"tokens.replay": 0}), dict(name="half", set={"tokens.replay": 0.5})]
METHODS = [dict(name="half", set={}), dict(name="most", set={"merge.candidates": [{"name": "most", "method": "linear", "weight": 0.9}]})]


def written(folder: Path, **more) -> Path:
    "A study of the tiny run as a file."
    data = dict(study="small", kind="replay", base="params/tiny.yaml", set=SMALL | {"train.steps": 8}, arms=TWO) | more
    (folder / "study.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return folder / "study.yaml"


@pytest.mark.parametrize("more, why", [
    (dict(armz=[]), "armz: unknown key; did you mean arms?"),
    (dict(arms=[dict(name="a", sett={})] + TWO), "arms.0.sett: unknown key; did you mean set?"),
    (dict(law=dict(tolerances=1)), "law.tolerances: unknown key; did you mean tolerance?"),
    (dict(kind="replays"), "kind: Input should be 'replay'"),
    (dict(arms=TWO[:1]), "arms: give at least two"),
    (dict(arms=TWO + TWO[:1]), "two arms are called none"),
    (dict(parallel=0), "parallel: Input should be greater than 0"),
    (dict(study="../up"), "study: String should match"),
    (dict(kind="checkpoints"), "a study of checkpoints has one for each that is exported"),
    (dict(kind="checkpoints", arms=[], set=SMALL | {"merge.grid": [{"method": "linear", "weight": [.5]}]}), "follows one merge over all"),
    (dict(base="params/absent.yaml"), "params/absent.yaml: no such file"),
    (dict(set={"train.stepps": 3}), "arms.none: train.stepps: unknown key; did you mean steps?"),
    (dict(arms=[TWO[0], dict(name="b", set={"tokens.replay": 2})]), "arms.b: tokens.replay: Input should be less"),
    (dict(arms=[TWO[0], dict(name="b", set={"run.x": 2})]), "arms.b.set: run.x=2: run holds no keys"),
    (dict(arms=[TWO[0], dict(name="b" * 64, set={"tokens.replay": .5})]), "run: String should have at most 64 characters"),
])
def test_a_yaml_that_is_wrong_is_refused_by_key(tmp_path, more, why):
    with pytest.raises(UserError) as e: load_study(written(tmp_path, **more))
    assert why in str(e.value) and ("study.yaml" in str(e.value) or "absent" in why)


@pytest.mark.parametrize("override", ["tokens.replay=0.1", "tokens={}", "tokens.replay.x=1"])
def test_what_arms_set_themselves_is_not_overridden_in_silence(tmp_path, override):
    file = written(tmp_path, arms=[*TWO, dict(name="other", set={"train.lr": .001})])
    with pytest.raises(UserError, match=f"^--set {override.partition('=')[0]}: arms none, half of the study set it themselves; change it there$"): load_study(file, (override,))
    assert load_study(file, ("train.steps=9",)).runs["half"].train.steps == 9


def test_a_date_in_a_study_is_a_text(tmp_path):
    grid = load_study(written(tmp_path, set=SMALL | {"report.title": date(2024, 5, 1)}, arms=[TWO[0], dict(name="b", set={"report.title": date(2024, 5, 2)})]))
    assert [p.report.title for p in grid.runs.values()] == ["2024-05-01", "2024-05-02"]
    assert arms_table(grid, {}, {}, pd.DataFrame(columns=["arm", "stage", "seconds", "shared"]))["changes"].iloc[1] == '{"report.title": "2024-05-02"}'


def test_no_code_in_the_yaml(tmp_path):
    (tmp_path / "s.yaml").write_text("study: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"): load_study(tmp_path / "s.yaml")


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(5, 60), batch=st.sampled_from([4, 8, 32]), replay=st.floats(.001, .9))
def test_under_16_sequences_are_refused_and_the_way_out_is_one(tmp_path_factory, steps, batch, replay):
    at = lambda n: load_study(written(tmp_path_factory.mktemp("s"), set=SMALL | {"train.steps": n, "train.global_batch": batch},
                                      arms=[TWO[0], dict(name="b", set={"tokens.replay": replay})]))
    said, few = rules(at(steps)), steps * batch * replay < ENOUGH - 1e-6
    assert few == bool(said)
    if few: assert rules(at(int(re.search(r"set train.steps to (\d+)", said[0])[1]))) == []


@pytest.mark.parametrize("more, why", [
    (dict(arms=[TWO[1], dict(name="b", set={"tokens.replay": 0.6})]), "arms: none has tokens.replay: 0"),
    (dict(arms=[*TWO, dict(name="b", set={"tokens.replay": .6, "train.lr": .5})]), "arms.b: a study of replay changes tokens.replay and nothing else; this arm also changes train.lr"),
    (dict(kind="merge_methods"), "a study of merge_methods changes merge.*"),
    (dict(kind="scale", arms=[dict(name="a"), dict(name="b")]), "arms: all have the same tokens and the same model"),
    (dict(kind="checkpoints", arms=[]), "train.export_at has one checkpoint"),
    *[(dict(kind=kind, arms=arms, set=SMALL | {"train.checkpoint": "some/model"}), f"train.checkpoint: it stands for a training, and a study of {kind} is of what is trained")
      for kind, arms in (("replay", TWO), ("scale", TWO), ("checkpoints", []))],
])
def test_arms_that_cannot_answer_the_question_are_refused(tmp_path, more, why):
    said = rules(load_study(written(tmp_path, **more)))
    assert any(why in s for s in said), said


def test_methods_may_be_compared_on_a_checkpoint_from_elsewhere(tmp_path):
    assert rules(load_study(written(tmp_path, kind="merge_methods", arms=METHODS, set=SMALL | {"train.checkpoint": "some/model"}))) == []


def test_check_tells_the_problems_of_every_arm_by_name(tmp_path, cli):
    arms = [TWO[0], dict(name="few", set={"tokens.replay": 0.1}), dict(name="odd", set={"tokens.replay": 0.5})]
    file = written(tmp_path, arms=arms, set=SMALL | {"train.steps": 8, "corpora.news.path": "no/such/file"})
    done = cli("check", file)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{file}: arms.few: tokens.replay 0.1 of train.steps 8 x train.global_batch 4 is 3.2 sequences" in done.stderr
    assert all(f"arms.{a}: corpora.news.path: no/such/file" in done.stderr for a in ("none", "few", "odd"))
    fine = cli("check", written(tmp_path))
    assert fine.returncode == 0 and "nothing wrong found" in fine.stdout, fine.stderr


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_has_nothing_wrong(path):
    grid = load_study(path)
    assert is_study(path) and grid.study.study == path.stem
    assert problems(grid, recipe=True) == []
    assert bool(grid.study.slurm) == path.stem.endswith("_cluster")


@pytest.mark.parametrize("name", ["checkpoints", "merge_methods", "scale"])
def test_an_array_that_waits_for_training_holds_no_gpu_and_has_room_to_merge(name):
    grid = load_study(ROOT / f"params/studies/{name}_cluster.yaml")
    slurm, biggest = grid.study.slurm, 4 * 70.6e9
    assert not {"gres", "exclusive"} & set(slurm.options) and slurm.memory_gb * int(slurm.options["cpus-per-task"]) * 1e9 > 2 * biggest
    for p in grid.runs.values():
        assert p.train.launcher != "local" and "gpu:8" == p.evaluate.slurm.options["gres"] and all(s.limit == 1 for s in p.evaluate.suites.values())


def test_the_last_step_of_scale_is_the_dearest():
    runs = load_study(ROOT / "params/studies/scale_cluster.yaml").runs
    assert list(ordered({a: SimpleNamespace(params=p) for a, p in runs.items()})) == list(runs) and flops(runs["70B-1.3G"]) > 1.5 * flops(runs["8B-5G"])


def test_the_presets_share_the_quickstarts_stages():
    quick, key = Run(QUICK).keys, lambda name, arm, stage: Run(load_study(ROOT / f"params/studies/{name}.yaml").runs[arm]).keys[stage]
    assert key("merge_methods", "ties", "train") == quick["train"] and key("scale", "66k", "train") == quick["train"]
    assert key("checkpoints", "step-8", "tokens") == quick["tokens"] and key("scale", "16k", "tokens") == quick["tokens"]


def test_the_ratios_are_those_that_were_asked_for():
    asked = {"none": 0, "70-to-1": 1 / 71, "65-to-5": 5 / 70, "60-to-10": 10 / 70, "10-to-1": 1 / 11, "1-to-1": 1 / 2}
    for name in ("replay", "replay_cluster"):
        runs = load_study(ROOT / f"params/studies/{name}.yaml").runs
        assert {a: round(p.tokens.replay, 3) for a, p in runs.items()} == {a: round(s, 3) for a, s in asked.items()}
        assert all(sequences(p) >= ENOUGH for p in runs.values() if p.tokens.replay)


def invented(params, levels: dict[str, tuple[float, float]], n: int = 24, noise: float = .004, seed: int = 0) -> Result:
    "A made-up result: bits per byte of each variant on a domain corpus and a general one."
    rng, hard, rows = np.random.default_rng(seed), np.random.default_rng(5).normal(0, .1, (2, n)), []
    for v, bits in levels.items():
        for c, (corpus, kind) in enumerate((("sec", "domain"), ("news", "general"))):
            rows += [dict(variant=v, corpus=corpus, kind=kind, half="all", document=str(i), block=0, tokens=100, bytes=400,
                          nll=400 * np.log(2) * (bits[c] + hard[c, i] + rng.normal(0, noise))) for i in range(n)]
    blocks = pd.DataFrame(rows)
    return Result(params, {}, blocks, "merge:half" if "merge:half" in levels else None, measures(stats.draws(blocks, 7), {"sec": "domain", "news": "general"}))


def replayed(share: float): return TINY.model_copy(update=dict(tokens=TINY.tokens.model_copy(update=dict(replay=share))))


LEVELS = {"none": (0, {"original": (1., 1.), "cpt": (.9, 1.1), "merge:half": (.92, 1.03)}),
          "some": (.2, {"original": (1., 1.), "cpt": (.9, 1.05), "merge:half": (.93, .96)}),
          "alike": (.5, {"original": (1., 1.), "cpt": (.9, 1.1), "merge:half": (.92, 1.03)})}


@pytest.fixture(scope="module")
def replay() -> dict[str, Result]: return {a: invented(replayed(r), levels, noise=0) for a, (r, levels) in LEVELS.items()}


@pytest.mark.oracle
def test_differences_and_the_interaction_are_the_sums_they_are(replay):
    t = contrasts("replay", replay).set_index(["what", "arm", "text"])["difference"]
    assert t["replay alone", "some", "general"] == pytest.approx(1.05 - 1.1)
    assert t["merge on top of training", "none", "general"] == pytest.approx(1.03 - 1.1)
    assert t["merge on top of replay", "some", "domain"] == pytest.approx(.93 - .9)
    assert t["replay on top of the merge", "some", "general"] == pytest.approx(.96 - 1.03)
    assert t["synergy", "some", "general"] == pytest.approx((.96 - 1.05) - (1.03 - 1.1))
    assert t["synergy", "alike", "general"] == pytest.approx(0, abs=1e-12)


@pytest.mark.oracle
def test_pairs_across_arms_are_pairs_in_one_table():
    arms = {a: invented(replayed(r), levels, seed=i) for i, (a, (r, levels)) in enumerate(LEVELS.items())}
    joint = stats.draws(pd.concat([r.blocks.assign(variant=f"{a}/" + r.blocks["variant"]) for a, r in arms.items()]), 7)["news"]
    mine = contrasts("replay", arms).set_index(["what", "arm", "text"]).loc["replay alone", "some", "general"]
    whole = stats.paired(joint["some/cpt"], joint["none/cpt"])
    for name in ("difference", "ci_low", "ci_high", "p"): assert mine[name] == pytest.approx(getattr(whole, name), rel=1e-9)


def synergy(merged: dict[str, tuple[float, float]]) -> pd.DataFrame:
    "The interactions of arms whose merges have these bits per byte, domain and general; without replay a merge has (.92, 1.03)."
    arms = {"none": invented(replayed(0), LEVELS["none"][1], noise=0)}
    for a, bits in merged.items(): arms[a] = invented(replayed(.2), {"original": (1., 1.), "cpt": (.91, 1.05), "merge:half": bits}, noise=.0001, seed=3)
    return contrasts("replay", arms)


def test_only_what_helps_alone_can_help_each_other():
    "In the domain replay and merging both cost; on general text both help."
    t = synergy({"less": (.91, .96), "more": (.95, 1.04)}).query("what == 'synergy'").set_index(["arm", "text"])["verdict"]
    assert t.to_dict() == {("less", "domain"): "together better than the sum of each", ("less", "general"): "they help each other",
                           ("more", "domain"): "together worse than the sum of each", ("more", "general"): "they do each other's work"}


@pytest.mark.parametrize("general, word", [((.96, .97), "holds"), ((.96, .98), "holds"), ((1.04, 1.03), "fails"), ((.96, 1.04), "cannot tell"), ((.98, .98), "cannot tell")])
def test_whether_replay_and_merging_are_synergistic(general, word):
    "Without interaction a merge with replay has .98 on general text."
    found = Found(None, {}, {"contrasts": synergy({str(i): (.92, g) for i, g in enumerate(general)})}, {})
    assert _synergistic(found).startswith(f"The papers' claim that replay and merging are synergistic: {word}. It holds where on general text")


@pytest.mark.parametrize("checkpoint, merge, word", [(.85, .9, "holds"), (.95, .97, "holds"), (.85, .97, "fails"), (.85, .93, "cannot tell"), (.9, .9, "cannot tell")])
def test_whether_better_checkpoints_merge_better(tmp_path, checkpoint, merge, word):
    "The first checkpoint has .9 bits per byte of domain text, and its merge .93."
    first, _, last = load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"train.steps": 8, "train.export_at": [0.25, 0.5, 1.0]})).runs.values()
    levels = {"original": (1., 1.), "cpt@2": (.9, 1.), "cpt": (checkpoint, 1.)}
    arms = {"first": invented(first, levels | {"merge:half": (.93, 1.)}, noise=0), "last": invented(last, levels | {"merge:half": (merge, 1.)}, noise=0)}
    assert _merge_better(Found(None, {}, {"contrasts": contrasts("checkpoints", arms)}, {})).startswith(f"The papers' claim that better checkpoints merge better: {word}. ")


def test_one_checkpoint_is_not_compared_with_itself(tmp_path):
    first = next(iter(load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"train.steps": 8, "train.export_at": [0.5, 1.0]})).runs.values()))
    only = {"only": invented(first, {"original": (1., 1.), "cpt@4": (.9, 1.), "cpt": (.8, 1.), "merge:half": (.93, 1.)})}
    assert set(contrasts("checkpoints", only)["what"]) == {"merge against its checkpoint"}
    assert "merge better: cannot tell." in _merge_better(Found(None, {}, {"contrasts": contrasts("checkpoints", only)}, {}))


def test_arms_that_read_other_text_are_not_compared(replay):
    other = invented(replayed(.2), LEVELS["some"][1], n=20)
    found = contrasts("replay", {"none": replay["none"], "some": other})
    assert set(found["arm"]) == {"none", "some"} and "replay alone" not in set(found["what"])


def test_an_arm_without_a_merge_leaves_the_others_be(replay):
    bare = invented(replayed(.2), {v: b for v, b in LEVELS["some"][1].items() if v != "merge:half"})
    found = contrasts("replay", replay | {"some": bare})
    assert set(found.loc[found["arm"] == "some", "what"]) == {"replay alone"}
    assert "merge" not in set(curve(replay | {"some": bare}, dict.fromkeys(replay, 0.), dict.fromkeys(replay, "x")).query("arm == 'some'")["variant"])


def test_verdicts_are_none_of_noise():
    rng = np.random.default_rng(0)
    same = {a: invented(replayed(r), {"original": (1., 1.), "cpt": (.9, 1.), "merge:half": (.9, 1.)}, noise=.01, seed=int(rng.integers(99)) + i) for i, (a, (r, _)) in enumerate(LEVELS.items())}
    assert (contrasts("replay", same)["verdict"] == "cannot tell").mean() > .8


def test_effects_are_those_of_the_report(replay):
    t = effects(replay).set_index(["arm", "variant", "measure"])["value"]
    assert t["some", "cpt", "domain_bits_per_byte"] == pytest.approx(replay["some"].of("domain_bits_per_byte", "cpt")[0])
    assert t["some", "merge:half", "gain_percent"] > 0 and t["some", "merge:half", "general_change_percent"] < 0 < t["some", "cpt", "general_change_percent"]
    assert t["some", "merge:half", "retention"] == pytest.approx((1 - .93) / (1 - .9))


def sized(steps: int): return TINY.model_copy(update=dict(train=TINY.train.model_copy(update=dict(steps=steps))))


@pytest.mark.oracle
def test_gain_for_its_price_is_gain_over_price():
    arms = ordered({"long": invented(sized(32), {"original": (1., 1.), "cpt": (.8, 1.)}), "short": invented(sized(8), {"original": (1., 1.), "cpt": (.9, 1.)})})
    assert list(arms) == ["short", "long"]
    cost = pd.DataFrame(dict(arm=["short", "long"], flops=[2e15, 8e15], process_seconds=[60., 180.], tokens=[1e6, 4e6]))
    t = marginal(arms, cost).set_index("arm")
    gain = arms["long"].of("gain_percent", "cpt")[0] - arms["short"].of("gain_percent", "cpt")[0]
    assert t.loc["long", "gain"] == pytest.approx(gain) and t.loc["long", "gain_per_process_minute"] == pytest.approx(gain / 2)
    assert t.loc["long", "gain_per_petaflop"] == pytest.approx(gain / 6) and t.loc["short", "gain_per_million_tokens"] == pytest.approx(t.loc["short", "gain"])
    assert t.loc["long", "gain_per_process_minute_low"] == pytest.approx(t.loc["long", "ci_low"] / 2)


def test_a_minute_of_training_is_one_of_each_process_over_all_tries(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps(dict(seconds={"import": 10.5, "load": 20, "steps": 90})))
    p = TINY.model_copy(update=dict(train=TINY.train.model_copy(update=dict(nodes=2, processes=4))))
    at = lambda: process_seconds(Result(p, {"train": tmp_path}, pd.DataFrame(), None, {}))
    assert at() == 120.5 * 8
    (tmp_path / "info.json").write_text(json.dumps(dict(checkpoint="some/model")))
    assert np.isnan(at())


@pytest.mark.parametrize("later, says", [
    ((.5, .4, .6, 60.), "A process-minute of training gave the CPT model 2.00 points in the first arm and 0.50 in the last step."),
    ((.5, .4, 1.9, 60.), "A process-minute of training gave the CPT model 2.00 points in the first arm and 0.50 in the last step; their intervals overlap, so which "
                         "is more cannot be told."),
    ((np.nan, np.nan, np.nan, -60.), "The training of long took no more process-minutes than that of short, so its step has no price.")])
def test_what_scaling_brought_and_at_what_price(later, says):
    price, low, high, cost = later
    rows = [dict(arm="short", before="original", process_seconds=60., gain=2., ci_low=1.8, ci_high=2.2, gain_per_process_minute=2., gain_per_process_minute_low=1.8, gain_per_process_minute_high=2.2),
            dict(arm="long", before="short", process_seconds=cost, gain=.5, ci_low=.4, ci_high=.6, gain_per_process_minute=price, gain_per_process_minute_low=low, gain_per_process_minute_high=high)]
    said, = _scale(Found(None, {}, {"marginal": pd.DataFrame(rows).assign(variant="cpt")}, {}))
    assert said == ("Percentage points of domain gain that the CPT model adds from arm to arm: original → short +2.00 [1.80,\xa02.20]; "
                    f"short → long +0.50 [0.40,\xa00.60]. {says}")


def told(kind: str, runs: dict) -> tuple[str, str]:
    "The first paragraph of a page of these runs, and the last."
    arms = {a: invented(p, {"original": (1., 1.), "cpt": (.9, 1.)}) for a, p in runs.items()}
    found = Found(Grid(SimpleNamespace(kind=kind), runs), arms, {}, {})
    return _setting(found).partition(" Measured on")[0], _caution(found)


OF_TEXT = "the intervals say how far other held-out text of the same kind would move a number, not how far another seed would."


def test_what_was_trained_and_how_small_it_is():
    "The tiny run's training is 8 steps of 4 sequences of 128 tokens."
    model = TINY.model
    assert told("replay", {"a": sized(8), "b": sized(16)}) == (
        f"2 arms of {model}, trained on 4.1 k to 8.19 k tokens each.",
        f"Each arm is one training with one seed: {OF_TEXT} The most that an arm has read is 8.19 k tokens; the paper's continual pre-training read 20 to 70 billion, "
        "2.44 M to 8.54 M times as many, and what is so here need not be so there.")
    assert told("merge_methods", {"a": sized(8), "b": sized(8)})[0] == f"2 arms of {model}, sharing one training on 4.1 k tokens."
    assert told("scale", {"a": sized(10 ** 7), "b": sized(2 * 10 ** 7)})[1] == (
        f"Each arm is one training with one seed: {OF_TEXT} All arms are of one size, so of sizes this page says nothing.")
    sizes = {"a": sized(10 ** 7), "b": sized(10 ** 7).model_copy(update=dict(model="another"))}
    assert told("scale", sizes)[1] == f"Each arm is one training with one seed: {OF_TEXT}"


def test_checkpoints_have_read_what_they_have_read(tmp_path):
    grid = load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"train.steps": 8, "train.export_at": [0.25, 1.0]}))
    first, last = told("checkpoints", grid.runs)
    assert first == f"2 arms of {TINY.model}, checkpoints of one training after 256 to 1.02 k tokens." and last.startswith("All arms share one training with one seed")


def test_of_a_checkpoint_from_elsewhere_no_tokens_are_told(tmp_path, replay):
    taken = TINY.model_copy(update=dict(train=TINY.train.model_copy(update=dict(checkpoint="some/model"))))
    assert told("merge_methods", {"a": taken}) == (f"1 arm of {TINY.model}, nothing was trained: all merge some/model.", f"All arms share one training with one seed: {OF_TEXT}")
    (tmp_path / "info.json").write_text(json.dumps(dict(checkpoint="some/model")))
    (tmp_path / "mixture.csv").write_text("corpus,asked,documents,tokens,share\n")
    study = Study(study="made", kind="merge_methods", base="params/tiny.yaml", arms=[Arm(name="a"), Arm(name="b")])
    done = {"a": Result(taken, {"train": tmp_path}, replay["none"].blocks, None, {})}
    rows = arms_table(Grid(study, {"a": taken, "b": taken}), done, {}, pd.DataFrame(columns=["arm", "stage", "seconds", "shared", "folder"]))
    assert rows[["tokens", "steps", "replay_asked", "flops", "process_seconds"]].isna().all(axis=None) and rows["ended"].tolist() == ["done", "failed"]


def test_what_the_page_of_methods_says():
    names = {"linear": (.92, 1.01), "slerp": (.95, 1.)}
    arms = {a: invented(TINY, {"original": (1., 1.), "cpt": (.9, 1.05), "merge:half": bits}, noise=0) for a, bits in names.items()}
    arms["ties"] = invented(TINY, {"original": (1., 1.), "cpt": (.9, 1.05)}, noise=0)
    said = _methods(Found(None, arms, {"contrasts": contrasts("merge_methods", arms)}, {}))
    gain = {a: arms[a].of("gain_percent", "merge")[0] for a in names}
    assert said == [
        f"Domain gains of the merges go from {gain['slerp']:.1f} to {gain['linear']:.1f}\xa0% (slerp and linear). Against linear's: on general text 1 better of 1 arm, "
        "at most \N{MINUS SIGN}10.0 [\N{MINUS SIGN}10.0,\xa0\N{MINUS SIGN}10.0] thousandths of a bit per byte (slerp); on domain text 1 worse of 1 arm, at most +30.0 [30.0,\xa030.0] thousandths of a "
        "bit per byte (slerp).",
        "Against the model before merging: on general text 2 better of 2 arms, at most \N{MINUS SIGN}50.0 [\N{MINUS SIGN}50.0,\xa0\N{MINUS SIGN}50.0] thousandths of a bit per byte (slerp); "
        "on domain text 2 worse of 2 arms, at most +50.0 [50.0,\xa050.0] thousandths of a bit per byte (slerp). The rule kept no merge of ties.",
        "An arm stands for the one of its merges that the rule chose: linear half, slerp half. Where their weights differ, a difference is of weight and method together."]
    assert _methods(Found(None, {"ties": arms["ties"]}, {}, {})) == ["No merge was kept."]


def test_what_the_page_of_checkpoints_says(tmp_path):
    grid = load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"train.steps": 8, "train.export_at": [0.25, 1.0]}))
    arms = {a: invented(p, {"original": (1., 1.), "cpt@2": (.95, 1.), "cpt": (.9, 1.), "merge:half": (x, 1.)}, noise=0) for (a, p), x in zip(grid.runs.items(), (.97, .94))}
    level = "on general text {0} too close to tell of {0} arm{1}, at most 0.0 [0.0,\xa00.0] thousandths of a bit per byte ({2})"
    assert _checkpoints(Found(grid, arms, {"contrasts": contrasts("checkpoints", arms)}, {}))[:2] == [
        f"From each checkpoint's merge to the next one's: {level.format(1, '', 'step-8')}; on domain text 1 better of 1 arm, at most \N{MINUS SIGN}30.0 "
        "[\N{MINUS SIGN}30.0,\xa0\N{MINUS SIGN}30.0] thousandths of a bit per byte (step-8).",
        f"Each merge against its own checkpoint: {level.format(2, 's', 'step-2')}; on domain text 2 worse of 2 arms, at most +40.0 [40.0,\xa040.0] "
        "thousandths of a bit per byte (step-8)."]


def test_which_points_the_law_may_use(tmp_path):
    def points(**train) -> list[int]:
        p = replayed(.2).model_copy(update=dict(train=TINY.train.model_copy(update=dict(steps=20, warmup=4) | train)))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "tokens": s * 10, "heldout/sec": 3.0, "heldout/news": 4.0, "heldout/encyclopedia": 2.0}) + "\n" for s in range(0, 21, 2)))
        t = law_points({"a": Result(p, {"train": tmp_path}, pd.DataFrame(), None, {})})
        assert set(t.loc[t["text"] == "general", "loss"]) == {3.0} and set(t["share"]) == {.2, .8}
        return sorted(set(t.loc[t["used"], "step"]))
    assert points(schedule="constant") == [6, 8, 10, 12, 14, 16, 18, 20]
    assert points(schedule="wsd") == [6, 8, 10, 12, 14, 16], "not the decay"
    assert points(schedule="cosine") == [20], "a point on the way of a decaying rate is no end"


SLICES = {"merge_method": "slerp", "base_model": "original", "parameters": {"t": .5}, "dtype": "float32",
          "slices": [{"sources": [{"model": m, "layer_range": [0, 2]} for m in ("original", "cpt")]}]}


def test_a_merge_of_slices_follows_the_checkpoints_too(tmp_path):
    few = dict(kind="checkpoints", arms=[], set=SMALL | {"train.export_at": [0.5, 1.0], "merge.candidates": [{"name": "cut", "mergekit": SLICES}]})
    runs = load_study(written(tmp_path, **few)).runs
    assert [merged(p) for p in runs.values()] == ["cpt@2", "cpt"] and runs["step-2"].merge.candidates[0].mergekit["dtype"] == "float32"
    assert [s["model"] for s in runs["step-2"].merge.candidates[0].mergekit["slices"][0]["sources"]] == ["original", "cpt@2"]


@pytest.mark.parametrize("names, why", [(("original", "base"), "it names no cpt"), (("cpt", "cpt@2"), "it names cpt, cpt@2")])
def test_a_merge_that_cannot_follow_the_checkpoints_is_refused(tmp_path, names, why):
    merge = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": .5}} for m in names]}
    with pytest.raises(UserError, match=f"study.yaml: merge.candidates.odd.mergekit: a study of checkpoints puts each in the place of cpt; {why}"):
        load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"merge.candidates": [{"name": "odd", "mergekit": merge}]}))


def test_a_merge_that_asks_for_no_dtype_is_of_the_models_own(tmp_path):
    for p in load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"train.export_at": [0.5, 1.0]})).runs.values():
        assert "dtype" not in p.merge.candidates[0].mergekit


def test_checkpoints_become_arms_with_their_own_model(tmp_path):
    grid = load_study(written(tmp_path, kind="checkpoints", arms=[], set=SMALL | {"train.steps": 8, "train.export_at": [0.25, 0.5, 1.0]}))
    assert {a: (merged(p), seen(p)) for a, p in grid.runs.items()} == {"step-2": ("cpt@2", 256), "step-4": ("cpt@4", 512), "step-8": ("cpt", 1024)}
    assert len({Run(p).keys["train"] for p in grid.runs.values()}) == 1 and shared(grid) == "train"


def bare(r: Result) -> Result:
    "The same without held-out general text."
    blocks = r.blocks[r.blocks["kind"] == "domain"]
    return Result(r.params, {}, blocks, r.merge, measures(stats.draws(blocks, 7), {"sec": "domain"}))


def test_without_general_text_the_page_says_it_was_not_measured(replay):
    arms = {a: bare(r) for a, r in replay.items()}
    study = Study(study="made", kind="replay", base="params/tiny.yaml", arms=[Arm(name=a) for a in arms])
    said = " ".join(words(Found(Grid(study, {a: r.params for a, r in arms.items()}), arms, {"contrasts": contrasts("replay", arms)}, {})))
    assert "against no replay: on general text not measured; on domain text 2 too close to tell of 2 arms" in said


def test_a_gain_of_nothing_is_left_out_and_one_of_zero_is_zero():
    arms = {a: invented(sized(n), {"original": (1., 1.), "cpt": (.9, 1.)}, noise=0) for a, n in (("short", 8), ("long", 32), ("broken", 64))}
    arms["broken"].drawn["gain_percent"]["cpt"][:] = np.nan
    t = marginal(arms, pd.DataFrame(dict(arm=list(arms), flops=[1., 2., 3.], process_seconds=[1., 2., 3.], tokens=[1., 2., 3.]))).set_index("arm")
    assert list(t.index) == ["short", "long"] and t.loc["long", "gain"] == 0 == t.loc["long", "gain_per_process_minute"]


def law_lines(ratios: tuple[float, ...], start: float = 2.6) -> pd.DataFrame:
    "law_points.csv of a known law at these shares of general text; an arm that ended in its warm-up is not used."
    true = dict(E=2.1, B=8.0, eta=0.2, beta=0.35, C=0.3, gamma=0.4, epsilon=0.05)
    rows = [dict(arm=f"r{r:g}", text=t, share=s, step=i, tokens=d, loss=float(law.predict(true, s, d)) if i else start, used=i > 0)
            for r in ratios for i, d in enumerate([0., *np.geomspace(5e3, 8e4, 4)]) for t, s in (("domain", 1 - r), ("general", r))]
    return pd.DataFrame(rows + [dict(arm="short", text="general", share=.9, step=0, tokens=0., loss=start, used=False)])


def law_page(points: pd.DataFrame, tolerance: float = 0.0) -> Found:
    tables, why = law_tables(points, Law(tolerance=tolerance, draws=8), 0)
    return Found(None, {}, tables | {"law_points": points}, {}, why)


def test_four_ratios_are_a_fit_that_nothing_is_held_out_of():
    found, few = law_page(law_lines((0, .05, .2, .5))), "the law needs at least 4 ratios, and there are 3"
    assert found.why == {"held out domain": few, "held out general": few}
    assert sorted(found.tables) == ["law", "law_fit", "law_points", "law_recommendation"]
    assert f"The law was not tried on a ratio it had not seen, of domain text: {few}; of general text: {few}." in _law(found) and "no fit" not in _law(found)
    few = law_page(law_lines((0, .05, .2)))
    assert set(few.why) == {"domain", "general", "recommendation"} and "law" not in few.tables
    assert _law(few).endswith("There is no fit of domain text: the law needs at least 4 ratios, and there are 3; of general text: the law needs at least 4 "
                              "ratios, and there are 3. No ratio is recommended: there is no fit of both texts.")


@pytest.mark.parametrize("start, says", [(9., "That is the lowest ratio that the law was fitted to, the edge of what was tried."), (2.6, ""),
                                         (1., "The law finds no ratio among those tried with the general loss at most 0\xa0% above where training began.")])
def test_a_recommendation_at_an_edge_of_what_was_fitted_says_so(start, says):
    said = _recommended(law_page(law_lines((.05, .1, .2, .5), start)))
    assert says in said and ("edge" in said) == ("edge" in says)


def test_the_upper_edge_is_one_too():
    fit = pd.DataFrame(dict(text=["domain", "general", "general"], share=[1., .05, .5]))
    row = dict(tokens=8e4, tolerance=.01, value=.5, low=.4, high=.5, possible=.75)
    assert _recommended(Found(None, {}, {"law_fit": fit, "law_recommendation": pd.DataFrame([row])}, {})) == (
        "With the general loss at most 1\xa0% above where training began, the law recommends a share of general text of 50.0\xa0% [40.0, 50.0] for 80 k tokens; "
        "75\xa0% of the draws find one. That is the highest ratio that the law was fitted to, the edge of what was tried.")


def test_how_well_the_law_foretold_is_counted():
    t = pd.DataFrame(dict(loss=[2., 4.], predicted=[2.02, 4.], low=[1.9, 4.1], high=[2.1, 4.2], neighbours=[2.04, np.nan]))
    said = _foretold(Found(None, {}, {"law_heldout": t}, {}))
    assert said == ("Fitted without an inner ratio, the law foretold its losses to within 0.50\xa0% on average (2 points, 50\xa0% inside the 95\xa0% interval); "
                    "a straight line between the neighbouring ratios is 2.00\xa0% off, so here the law foretells better than no law.")


@pytest.mark.parametrize("last, says", [(3.0943, "it did not move from 3.094 nats"), (3.1, "it went from 3.094 to 3.100 nats")])
def test_a_loss_that_stands_still_is_said_to(last, says):
    points = pd.DataFrame(dict(arm="none", text="general", share=0., tokens=[1., 2.], loss=[3.0944, last], used=True))
    assert says in _outside(Found(None, {}, {"law_points": points}, {}))


NASTY = "<script>alert(1)</script> & it broke"


@pytest.fixture(scope="module")
def site(tmp_path_factory, replay) -> Path:
    "The page of the made-up arms, one of which failed in a hostile way."
    from domain_adapt.contrasts import law_points
    from domain_adapt.study_page import _curve
    study = Study(study="made", kind="replay", title="Made <b>up</b> & *so*", base="params/tiny.yaml", arms=[Arm(name=a) for a in replay])
    cost = pd.DataFrame([dict(arm=a, stage="train", seconds=60., shared=a != "none", folder="train-x") for a in replay])
    arms = pd.DataFrame([dict(arm=a, run=f"made-{a}", steps=8, error="", replay_asked=r.params.tokens.replay, where=f"{ROOT}/x") for a, r in replay.items()])
    tables = dict(arms=arms, curve=_curve("replay", replay), contrasts=contrasts("replay", replay), effects=effects(replay), costs=cost)
    found = Found(Grid(study, {a: r.params for a, r in replay.items()}), replay, tables, {"lost": NASTY}, {"domain": "the law needs at least 4 ratios, and there are 3"})
    build(found, out := tmp_path_factory.mktemp("made"))
    (out / "said.json").write_text(json.dumps(words(found)))
    return out


def test_the_page_says_what_its_tables_say(site):
    text = " ".join(lxml.html.parse(site / "index.html").getroot().text_content().split())
    for paragraph in json.loads((site / "said.json").read_text()): assert " ".join(paragraph.split()) in text
    t = pd.read_csv(site / "tables/contrasts.csv").query("what == 'synergy' and text == 'general'")
    far = t.loc[t["difference"].abs().idxmax()]
    assert f"{far['difference'] * 1000:+.1f}".replace("-", "\N{MINUS SIGN}") in text and f"({far['arm']})" in text
    assert "1 help each other, 1 too close to tell of 2 arms" in text
    assert "would have taken 3.0 without being shared" in text and "took 1.0 minutes" in text
    assert "There is no fit of domain text: the law needs at least 4 ratios" in text and "No ratio is recommended" in text


def test_the_page_is_safe_whole_and_asks_nobody(site):
    tree = lxml.html.parse(site / "index.html")
    whole = (site / "index.html").read_text()
    assert tree.find(".//h1").text == "Made ‹b›up‹/b› & *so*"
    assert "Arm lost failed" in tree.getroot().text_content() and NASTY in " ".join(tree.getroot().text_content().split())
    assert "<script>alert" not in whole and str(ROOT) not in whole and str(ROOT) not in (site / "tables/arms.csv").read_text()
    assert all(s.get("aria-label") for s in tree.iterfind(".//svg[@role='img']")) and len(tree.findall(".//figure")) == 2
    for a in tree.iterfind(".//a[@download]"): assert (site / a.get("href")).is_file()
    assert not [e for e in tree.iter("script", "link", "img") if (e.get("src") or e.get("href") or "").startswith("http")]


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_a_desk_and_a_phone(chromium, site, size, theme):
    with opened(chromium, site / "index.html", size, theme) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert tab.locator(f".plate .{'narrow' if size == 'phone' else 'wide'} svg:visible").count() == 2


def at(outputs: Path) -> dict[str, str]: return {"DOMAIN_ADAPT_OUTPUTS": str(outputs)}


def folders(outputs: Path, stage: str) -> list[Path]: return list((outputs / ".stages").glob(f"{stage}-*"))
def whole(outputs: Path, stage: str) -> int: return sum((f / "stage.json").is_file() for f in folders(outputs, stage))


@pytest.fixture(scope="module")
def done(tmp_path_factory, cli):
    "A tiny study of replay whose last arm asks for more general text than there is; what the command said, its folder, its file."
    outputs, home = tmp_path_factory.mktemp("outputs"), tmp_path_factory.mktemp("home")
    arms = [*TWO, dict(name="greedy", set={"tokens.replay": 0.9})]
    file = written(home, arms=arms, set=SMALL | {"train.steps": 16, "train.max_epochs": 0.2, "corpora.encyclopedia.heldout": 0.9})
    return cli("study", file, env=at(outputs), timeout=1800), outputs, file


@pytest.mark.slow
def test_a_failed_arm_does_not_lose_the_others_and_is_named(done):
    said, outputs, _ = done
    assert said.returncode == 2 and "arm greedy failed: corpora.encyclopedia" in said.stderr and "the page has the other 2 arms" in said.stderr, said.stdout + said.stderr
    tree = lxml.html.parse(outputs / "small/index.html").getroot()
    assert "Arm greedy failed" in tree.text_content() and "more than train.max_epochs 0.2" in tree.text_content()
    t = pd.read_csv(outputs / "small/tables/arms.csv").set_index("arm")
    assert dict(t["ended"]) == {"none": "done", "half": "done", "greedy": "failed"} and t.loc["half", "replay_drawn"] == pytest.approx(.5, abs=.05)
    assert t.loc["none", "merge"] == "half" and t.loc["none", "seconds"] > 0 and t.loc["none", "flops"] > 0


@pytest.mark.slow
def test_nothing_is_done_twice(done, cli):
    said, outputs, file = done
    assert {s: whole(outputs, s) for s in ("ingest", "tokens", "train", "merge", "evaluate")} == {"ingest": 1, "tokens": 1, "train": 2, "merge": 2, "evaluate": 2}
    before = {p: p.stat().st_mtime_ns for p in (outputs / ".stages").rglob("*") if p.is_file() and ".locks" not in p.parts}
    refused = cli("study", outputs / "small/study.yaml", env=at(outputs))
    assert refused.returncode == 2 and "arms.greedy: corpora.encyclopedia" in refused.stderr, "its tokens have been counted meanwhile"
    study = yaml.safe_load((outputs / "small/study.yaml").read_text())
    file.write_text(yaml.safe_dump(study | {"arms": [a for a in study["arms"] if a["name"] != "greedy"]}, sort_keys=False))
    again = cli("study", file, env=at(outputs), timeout=1800)
    assert "2 arms, 2 done already" in again.stdout and again.returncode == 0, again.stdout + again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in (outputs / ".stages").rglob("*") if p.is_file() and ".locks" not in p.parts}
    cost = pd.read_csv(outputs / "small/tables/costs.csv")
    assert cost.loc[cost["shared"], "stage"].tolist() == ["ingest", "tokens"]


@pytest.mark.slow
def test_an_arm_is_a_run_that_can_have_its_own_report(done, cli):
    _, outputs, _ = done
    own = cli("run", outputs / "small/arms/half.yaml", env=at(outputs))
    assert own.returncode == 0 and (outputs / "small-half/6_report/index.html").is_file(), own.stderr
    assert whole(outputs, "train") == 2


def started(file: Path, outputs: Path, stage: str, **more) -> subprocess.Popen:
    "A study, waited for until a stage's folder is there and unfinished."
    child = subprocess.Popen([sys.executable, "-m", "domain_adapt.cli", "study", str(file)], cwd=ROOT, env=os.environ | at(outputs),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    while not folders(outputs, stage):
        assert child.poll() is None, child.stdout.read()
        time.sleep(.1)
    return child


def tree_of(child: subprocess.Popen) -> list[psutil.Process]: return [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped_and_arms_at_once_wait_for_what_they_share(tmp_path):
    "Stopped in three ways at three stages; then done by two studies at once, so that nothing but the stages' own locks keeps their arms apart."
    file, outputs, files = written(tmp_path, kind="merge_methods", arms=METHODS), tmp_path / "outputs", []
    for how, code, stage in (signal.SIGINT, 130, "ingest"), (signal.SIGTERM, 130, "tokens"), (signal.SIGKILL, -9, "train"):
        child = started(file, outputs, stage)
        below = tree_of(child)
        child.send_signal(how)
        said = child.communicate(timeout=120)[0]
        assert child.returncode == code and "Traceback" not in said, said
        assert not psutil.wait_procs(below, timeout=30)[1], "a process outlived the study"
    kept = {p: p.stat().st_mtime_ns for s in ("ingest", "tokens") for f in folders(outputs, s) for p in f.rglob("*")}
    for name in ("small", "twin"):
        (tmp_path / name).mkdir()
        files.append(written(tmp_path / name, study=name, kind="merge_methods", arms=METHODS, parallel=2))
    both = [subprocess.Popen([sys.executable, "-m", "domain_adapt.cli", "study", str(f)], cwd=ROOT, env=os.environ | at(outputs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for f in files]
    for child, name in zip(both, ("small", "twin")):
        said = child.communicate(timeout=1800)[0]
        assert child.returncode == 0 and (outputs / name / "index.html").is_file(), said
        assert pd.read_csv(outputs / name / "tables/arms.csv")["ended"].tolist() == ["done", "done"]
    assert kept == {p: p.stat().st_mtime_ns for s in ("ingest", "tokens") for f in folders(outputs, s) for p in f.rglob("*")}
    assert {s: len(folders(outputs, s)) for s in ("ingest", "tokens", "train", "merge")} == {"ingest": 1, "tokens": 1, "train": 1, "merge": 2}
    assert not list(outputs.glob("*/notebooks/*.failed.ipynb")) and len(list(outputs.glob("*/notebooks/4_merge.ipynb"))) == 2, "each merge was made once"


@pytest.mark.server
@pytest.mark.slow
def test_an_array_of_slurm_does_the_same(tmp_path, cli, slurm_here):
    file, outputs = written(tmp_path, kind="merge_methods", arms=METHODS, slurm=dict(partition="main", memory_gb=4)), tmp_path / "outputs"
    said = cli("study", file, env=at(outputs) | slurm_here, timeout=1800)
    assert said.returncode == 0, said.stdout + said.stderr
    scripts = sorted((outputs / "small/jobs").rglob("launch_script.slurm"))
    assert sorted(re.search(r"--array=\S+", s.read_text())[0] for s in scripts) == ["--array=0-0", "--array=0-1"], "what they share first, then a task an arm"
    assert pd.read_csv(outputs / "small/tables/arms.csv")["ended"].tolist() == ["done", "done"]
    assert {s: len(folders(outputs, s)) for s in ("train", "merge")} == {"train": 1, "merge": 2}
