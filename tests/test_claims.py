"""Claims: what decides each, against tables whose truth is known; lineage against the tiny run's own files."""
import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

import made_run
from domain_adapt import provenance
from domain_adapt.claims import CLAIMS, Evidence, Finding, below, claims, claims_sentence, moved, same
from domain_adapt.runs import write_csv, write_json, write_text
from domain_adapt.stats import POWER
from domain_adapt.summary import summarise, read_tables

ends = st.floats(-5, 5).flatmap(lambda a: st.floats(0, 5).map(lambda w: (a, a + w)))


@given(ends)
def test_a_claim_turned_round_is_told_the_other_way(i):
    low, high = i
    turned = {"holds": "fails", "fails": "holds", "cannot tell": "cannot tell"}
    assert moved(-high, -low) == turned[moved(low, high)] == moved(low, high, down=False)
    assert same(low, high, 1) == same(-high, -low, 1)


@given(ends, st.floats(0.1, 3))
def test_a_wider_interval_never_decides_what_a_narrow_one_left_open(i, wider):
    low, high = i
    for judge in (moved, lambda a, b: same(a, b, 1), lambda a, b: below(a, b, 1)):
        if judge(low, high) == "cannot tell": assert judge(low - wider, high + wider) == "cannot tell"


def test_what_is_not_known_is_not_decided():
    assert {f(np.nan, np.nan) for f in (moved, lambda a, b: same(a, b, 1), lambda a, b: below(a, b, 1))} == {"cannot tell"}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[pd.DataFrame, dict]:
    "The claims of a made-up run, by their text, and its summary."
    params, folders = made_run.make(tmp_path_factory.mktemp("claims"), books=False)
    summary = summarise(params, folders, read_tables(folders))
    return claims(Evidence(params, folders, summary["winner"])).set_index("claim"), summary


def test_every_claim_has_a_row_and_a_verdict(found):
    table, _ = found
    assert list(table.index) == [c.text for c in CLAIMS] and set(table["verdict"]) <= {"holds", "fails", "cannot tell"}
    unmeasured = table[table["value"].isna()]
    assert (unmeasured["verdict"] == "cannot tell").all() and unmeasured["measure"].str.contains("it needs").all()
    holds, fails = ((table["verdict"] == v).sum() for v in ("holds", "fails"))
    assert f"{holds} hold on this run, {fails} fail" in claims_sentence(table)


def test_values_are_those_of_the_summary(found):
    table, s = found
    gain, change, kept = s["gain_percent"]["cpt"], s["general_change_percent"]["cpt"], s["retention"][s["winner"]]
    given = lambda claim: table.loc[claim, ["value", "ci_low", "ci_high"]].tolist()
    summed = lambda i, scale=1: [scale * i[k] for k in ("value", "low", "high")]
    assert given("CPT lowers the perplexity of domain text") == pytest.approx([-gain[k] for k in ("value", "high", "low")], rel=1e-12)
    assert given("The merge keeps what the domain gained") == pytest.approx(summed(kept, 100), rel=1e-12)
    assert given("The perplexity of general text does not rise") == pytest.approx(summed(change), rel=1e-12)


def test_the_mean_of_scores_is_that_of_the_paired_differences(found, tmp_path):
    table, _ = found
    _, folders = made_run.make(tmp_path, books=False)
    compared = pd.read_csv(folders["evaluate"] / "comparisons.csv").query("variant == 'cpt' and against == 'original'")
    row = table.loc["CPT lowers general scores"]
    assert row["value"] == pytest.approx(100 * compared["difference"].mean()) and row["n"] == f"{len(compared)} tasks"
    assert table.loc["The merge recovers general scores", "verdict"] == "cannot tell"    # nothing was lost for certain


def _sure(folders: dict[str, Path], difference: float) -> None:
    path = folders["evaluate"] / "comparisons.csv"
    t = pd.read_csv(path)
    t.loc[(t["variant"] == "cpt") & (t["against"] == "original"), "difference"] = difference
    t.loc[(t["variant"] != "cpt") & (t["against"] == "cpt"), "difference"] = -difference
    t.assign(smallest_detectable=.01).to_csv(path, index=False)


@pytest.mark.parametrize("difference, fell, recovered", [(-.1, "holds", "holds"), (.1, "fails", "cannot tell")])
def test_scores_that_fell_for_certain_can_be_recovered(tmp_path, difference, fell, recovered):
    params, folders = made_run.make(tmp_path, books=False)
    _sure(folders, difference)
    table = claims(Evidence(params, folders, made_run.KEPT[0])).set_index("claim")["verdict"]
    assert (table["CPT lowers general scores"], table["The merge recovers general scores"]) == (fell, recovered)


def judged(at: Path, claim: str, winner: str | None = "merge:m", params=None, **tables: pd.DataFrame) -> Finding | None:
    "What a claim is found to be on a run that has nothing but these tables, named <stage>_<table>."
    for name, table in tables.items():
        stage, _, file = name.partition("_")
        write_csv(at / stage / f"{file}.csv", table)
    folders = {stage: at / stage for stage in ("merge", "evaluate")}
    return next(c for c in CLAIMS if c.text == claim).find(Evidence(params or made_run.params(), folders, winner))


def angles(*pairs: tuple[str, str], weights: float = .999, task_vectors: float = .02) -> pd.DataFrame:
    return pd.DataFrame([dict(model=m, against=a, module="all", parameters=1000, cosine_of_weights=weights,
                              cosine_of_task_vectors=task_vectors) for m, a in pairs])


def swept(**candidates: tuple[str, dict, float]) -> dict[str, pd.DataFrame]:
    "The merge stage's sweep.csv and blocks.csv of candidates: method, settings and bits per byte."
    rng = np.random.default_rng(0)
    rows = [dict(variant=f"merge:{n}", corpus=c, kind=k, document=str(d), block=0, half="select", bytes=4000, nll=4000 * np.log(2) * (bits + level))
            for c, k in (("sec", "domain"), ("wiki", "general")) for d, level in enumerate(rng.normal(0, .1, 30))
            for n, (*_, bits) in candidates.items()]
    sweep = pd.DataFrame([dict(name=n, method=m, parameters=json.dumps(s)) for n, (m, s, _) in candidates.items()])
    return dict(merge_sweep=sweep, merge_blocks=pd.DataFrame(rows))


@pytest.mark.parametrize("bits, slerp, ties, dare", [
    (1, "holds", "holds", "holds"), (1.01, "fails", "holds", "fails"), (.99, "fails", "fails", "fails")])
def test_merges_are_held_against_their_like(tmp_path, bits, slerp, ties, dare):
    at = lambda method, **settings: (method, settings, bits)
    plain, whole = ("linear", dict(weight=.5), 1), ("ties", dict(weight=.5, density=.9), 1)
    for claim, verdict, tried in (("So SLERP equals linear", slerp, dict(plain=plain, other=at("slerp", t=.5))),
                                  ("So TIES has no edge over linear", ties, dict(plain=plain, other=at("ties", weight=.5, density=.9))),
                                  ("DARE-TIES is like TIES", dare, dict(plain=whole, other=at("dare_ties", weight=.5, density=.9)))):
        f = judged(tmp_path / claim, claim, **swept(**tried))
        assert (f.verdict, f.value) == (verdict, pytest.approx(bits - 1)) and f.measure.startswith("other less plain")


def test_only_merges_of_equal_weight_and_density_are_alike(tmp_path):
    dare, ties, plain = (dict(weight=.5, density=.5), dict(weight=.5, density=.1), dict(weight=.5))
    tables = swept(dare=("dare_ties", dare, 1), thin=("ties", ties, 1), plain=("linear", plain, 1), own=("ties", dict(cpt=dict(weight=.5)), 1),
                   own_dare=("dare_ties", dict(cpt=dict(weight=.3)), 1), own_linear=("linear", dict(cpt=dict(weight=.3)), 1))
    assert judged(tmp_path / "unlike", "DARE-TIES is like TIES", **tables) is None
    more = swept(thin=("ties", ties, 1), thick=("ties", dict(weight=.5, density=.7), 1), bent=("ties", dict(weight=.5, density=[.9, .9]), 1),
                 plain=("linear", plain, 1))
    assert judged(tmp_path / "densest", "So TIES has no edge over linear", **more).measure.startswith("thick less plain")


def read(**bits: tuple[float, ...]) -> dict[str, pd.DataFrame]:
    "The evaluate stage's blocks.csv of variants (`merge` is merge:m, `early` cpt@20): bits per byte of domain, then of general text."
    rng, named = np.random.default_rng(0), dict(merge="merge:m", early="cpt@20")
    return dict(evaluate_blocks=pd.DataFrame([
        dict(variant=named.get(v, v), corpus=c, kind=made_run.KINDS[c], half="report", document=str(d), block=0, tokens=1000, bytes=4000,
             nll=4000 * np.log(2) * b * level)
        for i, c in enumerate(("sec", "wiki")) for d, level in enumerate(rng.normal(1, .1, 30)) for v, both in bits.items()
        for b in [both[i] * rng.normal(1, 1e-4)]]))


TEXT = [("CPT lowers the perplexity of domain text", dict(original=(1, 1), cpt=(.9, 1)), dict(original=(1, 1), cpt=(1.1, 1))),
        ("The perplexity of general text does not rise", dict(original=(1, 1), cpt=(1, 1.005)), dict(original=(1, 1), cpt=(1, 1.02))),
        ("More tokens of CPT lower it further", dict(original=(1, 1), early=(.95, 1), cpt=(.9, 1)),
         dict(original=(1, 1), early=(.9, 1), cpt=(.95, 1))),
        ("The merge keeps what the domain gained", dict(original=(1, 1), cpt=(.9, 1), merge=(.92, 1)),
         dict(original=(1, 1), cpt=(.9, 1), merge=(.98, 1))),
        ("The merge reads general text better than CPT", dict(original=(1, 1), cpt=(.9, 1.02), merge=(.9, 1)),
         dict(original=(1, 1), cpt=(.9, 1), merge=(.9, 1.02))),
        ("The merge beats both of its parents on general text", dict(original=(1, 1), cpt=(.9, 1.02), merge=(.9, .99)),
         dict(original=(1, 1), cpt=(.9, 1.02), merge=(.9, 1.01)))]


@pytest.mark.parametrize("claim, holds, fails", TEXT)
def test_claims_on_text_are_told_both_ways(tmp_path, claim, holds, fails):
    assert [judged(tmp_path / v, claim, **read(**bits)).verdict for v, bits in (("holds", holds), ("fails", fails))] == ["holds", "fails"]


def test_the_change_is_the_mean_over_the_runs_own_corpora(tmp_path):
    t = read(original=(1, 1), cpt=(1, 1.1))["evaluate_blocks"]
    news = t[t["corpus"] == "wiki"].assign(corpus="news")
    news.loc[news["variant"] == "original", "nll"] *= 3
    news.loc[news["variant"] == "cpt", "nll"] *= 3 * 1.2 / 1.1
    other = t[t["corpus"] == "wiki"].assign(corpus="somebody's text", nll=lambda x: x["nll"] ** 1.1)
    f = judged(tmp_path, "The perplexity of general text does not rise", evaluate_blocks=pd.concat([t, news, other]))
    assert f.value == pytest.approx((10 + 20) / 2, abs=.02) and f.n == "60 blocks of 60 documents"


def scored(*pairs: tuple[str, str, float], tasks=("hellaswag",)) -> dict[str, pd.DataFrame]:
    "comparisons.csv of variants, against, and their difference in score in each of some tasks, of a standard error of 0.01."
    return dict(evaluate_comparisons=pd.DataFrame([dict(variant=v, against=a, measure=f"{t}/acc", difference=d, smallest_detectable=.01 * POWER)
                                                   for v, a, d in pairs for t in tasks]))


LOST, MEDICAL = ("cpt", "original", -.1), ("medmcqa", "pubmedqa@chat")
SCORES = [("CPT lowers general scores", [LOST], ("hellaswag",), "holds"),
          ("CPT lowers general scores", [("cpt", "original", .1)], ("hellaswag",), "fails"),
          ("The merge recovers general scores", [LOST, ("merge:m", "cpt", .1)], ("hellaswag",), "holds"),
          ("The merge recovers general scores", [LOST, ("merge:m", "cpt", -.1)], ("hellaswag",), "fails"),
          ("CPT raises domain scores", [("cpt", "original", .1)], MEDICAL, "holds"), ("CPT raises domain scores", [LOST], MEDICAL, "fails"),
          ("The merge raises domain scores", [("merge:m", "original", .1), ("merge:m", "cpt", -.05)], MEDICAL, "holds"),
          ("The merge raises domain scores", [("merge:m", "original", -.1), ("merge:m", "cpt", .05)], MEDICAL, "fails"),
          ("The merge raises domain scores", [("merge:m", "original", .1), ("merge:m", "cpt", .1)], ("hellaswag",), None)]


@pytest.mark.parametrize("claim, pairs, tasks, verdict", SCORES)
def test_claims_on_scores_are_told_both_ways(tmp_path, claim, pairs, tasks, verdict):
    f = judged(tmp_path, claim, **scored(*pairs, tasks=tasks))
    assert (f and f.verdict) == verdict
    if verdict and claim.startswith("The merge raises"): assert f"against CPT {'−+'[verdict == 'fails']}5.0 [" in f.measure


def test_errors_of_tasks_that_ask_the_same_questions_are_not_independent(tmp_path):
    tasks = {"truthfulqa_mc1": "t", "truthfulqa_mc2": "t", "hellaswag": "h", "hellaswag@chat": "h", "piqa": "p"}
    write_json(tmp_path / "evaluate" / "settings.json", dict(suites=dict(nous=dict(tasks={k: dict(items_hash=v) for k, v in tasks.items()}))))
    f = judged(tmp_path, "CPT lowers general scores", **scored(LOST, tasks=tasks))
    assert (f.value, f.high - f.value) == (pytest.approx(-10), pytest.approx(1.96 * (2 ** 2 + 2 ** 2 + 1) ** .5 / 5))


@pytest.mark.parametrize("original, cpt, merge, verdict", [
    (20, 9, 18, "holds"), (20, 12, 1, "fails"), (6, 9, 18, "cannot tell"), (20, 9, 10, "cannot tell")])
def test_answers_that_broke_off_can_be_finished_again(tmp_path, original, cpt, merge, verdict):
    stopped = {"original": original, "cpt": cpt, "merge:m": merge}
    talk = [dict(variant=v, kind="finance", prompt=f"{i}", stopped=i < n) for v, n in stopped.items() for i in range(20)]
    write_text(tmp_path / "evaluate" / "samples" / "chat.jsonl", pd.DataFrame(talk).to_json(orient="records", lines=True))
    f = judged(tmp_path, "The merge restores the finishing of answers")
    assert (f.value, f.verdict) == (pytest.approx(5 * (merge - cpt)), verdict) and ("not known to have lost" in f.measure) == (original < cpt)


APART = "Task vectors of different trainings are nearly orthogonal"


@pytest.mark.parametrize("pair, checkpoint, told", [
    (("original", "cpt"), None, False), (("original", "cpt"), "elsewhere", True), (("cpt", "cpt@20"), None, False),
    (("cpt", "cpt@20"), "elsewhere", False), (("original", "cpt@20"), None, False), (("cpt", "chat"), None, True),
    (("cpt", "cptx"), None, True)])
def test_two_points_of_one_road_are_not_two_trainings(tmp_path, pair, checkpoint, told):
    p = made_run.params()
    p = p.model_copy(update=dict(train=p.train.model_copy(update=dict(checkpoint=checkpoint))))
    f = judged(tmp_path, APART, params=p, merge_geometry=angles(pair))
    assert (f is not None) == told and (not told or (f.value, f.verdict) == (.02, "holds"))


@pytest.mark.parametrize("cosine, verdict", [(.999, "holds"), (.9, "fails")])
def test_the_weights_are_those_of_cpt_and_the_original(tmp_path, cosine, verdict):
    t = pd.concat([angles(("original", "base"), ("cpt", "base"), weights=.5), angles(("original", "cpt"), weights=cosine)])
    f = judged(tmp_path, "CPT hardly turns the weights: their cosine is near 1", merge_geometry=t)
    assert (f.value, f.verdict) == (cosine, verdict)


def test_ties_says_at_what_angle_its_task_vectors_were(tmp_path):
    tables = swept(plain=("linear", dict(weight=.5), 1), other=("ties", dict(weight=.5, density=.9), 1))
    told = lambda name, **more: judged(tmp_path / name, "So TIES has no edge over linear", **tables, **more).measure.rpartition("; ")[2]
    unknown = "the cosine of the task vectors was not measured"
    assert (told("none"), told("one", merge_geometry=angles(("cpt", "original"), task_vectors=np.nan))) == (unknown, unknown)
    over_base = pd.concat([angles(("cpt", "base"), task_vectors=np.nan), angles(("original", "cpt"), task_vectors=.97)])
    assert told("two", merge_geometry=over_base) == "the cosine of the task vectors was 0.970"


@pytest.mark.parametrize("curve, density, verdict", [
    ({.1: (.02, .01), .5: (-.03, .01)}, .5, "holds"), ({.1: (.02, .01), .5: (.03, .01)}, .1, "fails"), ({.5: (-.02, .01)}, .5, "holds"),
    ({.1: (.02, .01), .5: (.01, .02)}, .5, "cannot tell"), ({.1: (.02, .01), .5: (-.0105, .01)}, .5, "cannot tell"),
    ({.1: (np.nan, np.nan), .5: (.02, .01)}, .1, "cannot tell"), ({.1: (np.nan, np.nan)}, .1, "cannot tell")])
def test_every_lower_density_is_looked_at(tmp_path, curve, density, verdict):
    t = pd.DataFrame([dict(model="cpt", density=d, kind="domain", tokens=9, difference=x, difference_low=x - half, difference_high=x + half)
                      for d, (x, half) in ({1.0: (0, 0)} | curve).items()])
    f = judged(tmp_path, "Lower densities help", merge_density=t)
    assert f.verdict == verdict and f"at density {density:g}" in f.measure


def test_task_vectors_at_an_angle_are_not_orthogonal(tmp_path):
    assert judged(tmp_path, APART, merge_geometry=angles(("cpt", "chat"), task_vectors=.4)).verdict == "fails"


@pytest.mark.oracle
def test_lineage_is_what_sha256sum_says(tiny_run):
    home = tiny_run / "tiny"
    folders = {s: (home / f"{n}_{s}").resolve() for n, s in enumerate(("ingest", "tokens", "train", "merge", "evaluate"), 1)}
    done = provenance.records(folders)
    files = provenance.file_table(done)
    for r in files.itertuples():
        said = subprocess.run(["sha256sum", folders[r.stage] / r.file], capture_output=True, text=True, check=True).stdout.split()[0].lstrip("\\")
        assert said == r.sha256
    models = provenance.model_table(folders, done).set_index("model")
    for name, row in models.iterrows():
        if not name.startswith("merge:"): continue
        folder = folders["merge"] / name.removeprefix("merge:")
        lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(folder.glob("*.safetensors"))]
        assert hashlib.sha256("".join(lines).encode()).hexdigest() == row["sha256"] and "cpt" in row["made_of"]
    documents = provenance.document_table(folders, ["sec", "encyclopedia", "news"])
    splits = pd.read_csv(folders["tokens"] / "splits.csv").query("split == 'heldout'").set_index("corpus")["documents"]
    assert documents.query("part == 'held out'").groupby("corpus").size().to_dict() == {c: n for c, n in splits.items() if n}


def test_a_stage_records_what_it_ran_on(tiny_run):
    for record in (tiny_run / "tiny").glob("[1-6]_*/stage.json"):
        told = json.loads(record.read_text())
        assert told["peak_memory_bytes"] > 2 ** 24 and told["machine"]["cores"] >= 1 and told["machine"]["memory_bytes"] > 2 ** 30
