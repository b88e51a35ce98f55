"Verdicts of comparisons.csv: what must follow from swapping variants, from equal variants, and from chance alone."
import json
from math import log
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from domain_adapt import stats
from domain_adapt.benchmarks import Task, compare, samples_file

OPPOSITE = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}
TASKS = [Task(name, SimpleNamespace(config=SimpleNamespace(metadata={"group": group}, metric_list=[{"metric": metric}])), [])
         for name, metric, group in (("piqa", "acc_norm", ""), ("boolq", "acc", "GPT4All"), ("arc_easy", "acc", "GPT4All"))]
GAINS = {"original": 0.0, "cpt": 0.15, "merge:a": 0.1}


def measured(out, gains: dict[str, float], seed: int, items: int = 120, documents: int = 25) -> pd.DataFrame:
    "Samples below `out`, and blocks: a variant with more gain answers more items and pays fewer bits."
    g = np.random.default_rng(seed)
    for t in TASKS:
        hard = g.random(items)
        for v, gain in gains.items():
            right = hard < 0.5 + g.normal(gain, 0.05)
            file = samples_file(out, v, t.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps({"item": f"test/{i}", t.main_metric: float(r)}) + "\n" for i, r in enumerate(right)))
    size = g.integers(500, 5000, documents)
    bits = {c: g.normal(1, 0.2, documents) for c in ("sec", "news")}
    return pd.DataFrame([dict(variant=v, corpus=c, kind="domain", half="report", document=f"d{d}", block=0, bytes=size[d],
                              nll=size[d] * log(2) * (bits[c][d] - gain * g.normal(1, 2)))
                         for v, gain in gains.items() for c in bits for d in range(documents)])


def swapped(out, blocks: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    "The same measurements, with the names of two variants exchanged."
    folders = {v: out / "samples" / v for v in (a, b)}
    folders[a].rename(out / "aside")
    folders[b].rename(folders[a])
    (out / "aside").rename(folders[b])
    return blocks.assign(variant=blocks["variant"].replace({a: b, b: a}))


def table(out, blocks: pd.DataFrame, seed: int) -> pd.DataFrame:
    order = sorted(blocks["variant"].unique(), key=list(GAINS).index)
    blocks = pd.concat([blocks[blocks["variant"] == v] for v in order], ignore_index=True)
    return compare(out, blocks, TASKS, seed).set_index(["variant", "against", "measure"])


def mirrored(there: pd.DataFrame, back: pd.DataFrame) -> None:
    assert list(there.index) == list(back.index) and len(there)
    assert there["verdict"].map(OPPOSITE).tolist() == back["verdict"].tolist()
    assert there["q"].tolist() == back["q"].tolist() and there["p"].tolist() == back["p"].tolist()
    for here, other in (("difference", "difference"), ("ci_low", "ci_high"), ("ci_high", "ci_low")):
        assert there[here].tolist() == pytest.approx((-back[other]).tolist())
    assert there["smallest_detectable"].tolist() == pytest.approx(back["smallest_detectable"].tolist())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_swapping_two_variants_flips_every_verdict_and_no_q(tmp_path_factory, seed):
    out = tmp_path_factory.mktemp("swap")
    blocks = measured(out, dict(original=0.0, cpt=GAINS["cpt"]), seed)
    there = table(out, blocks, 7)
    back = table(out, swapped(out, blocks, "original", "cpt"), 7)
    assert len(there) == 2 + len(TASKS) + 1    # two corpora, the tasks, and the group that two of them make
    mirrored(there, back)


def test_there_are_verdicts_to_flip(tmp_path):
    verdicts = table(tmp_path, measured(tmp_path, dict(original=0.0, cpt=GAINS["cpt"]), 1), 7)["verdict"]
    assert verdicts[verdicts.index.get_level_values("measure").str.startswith("bits")].eq("better").any()
    assert verdicts["cpt", "original", "piqa/acc_norm"] == "better"


def test_q_is_over_the_measures_of_one_pair(tmp_path):
    found = table(tmp_path, measured(tmp_path, dict(original=0.0, cpt=0.03, **{"merge:a": 0.1}), 2), 7)
    for _, pair in found.groupby(["variant", "against"]):
        assert pair["q"].tolist() == pytest.approx(scipy_stats.false_discovery_control(pair["p"]).tolist()) and (pair["q"] > pair["p"]).any()
        assert (pair.loc[pair["q"] > 0.05, "verdict"] == "cannot tell").all()


def test_answers_are_paired_by_item(tmp_path):
    blocks = measured(tmp_path, dict(original=0.0, cpt=GAINS["cpt"]), 1)
    there = table(tmp_path, blocks, 7)
    for t in TASKS:
        file = samples_file(tmp_path, "cpt", t.name)
        file.write_text("".join(sorted(file.read_text().splitlines(keepends=True), reverse=True)))
    pd.testing.assert_frame_equal(table(tmp_path, blocks, 7), there)


def test_swapping_with_a_third_variant_flips_their_pair_and_exchanges_the_others(tmp_path):
    blocks = measured(tmp_path, GAINS, 3)
    there = table(tmp_path, blocks, 7)
    back = table(tmp_path, swapped(tmp_path, blocks, "cpt", "merge:a"), 7)
    mirrored(there.loc[["merge:a"]].xs("cpt", level="against"), back.loc[["merge:a"]].xs("cpt", level="against"))
    for a, b in (("cpt", "merge:a"), ("merge:a", "cpt")):
        pd.testing.assert_frame_equal(there.loc[a].loc["original"], back.loc[b].loc["original"])


def test_a_copy_of_a_variant_is_told_from_it_by_nothing(tmp_path):
    blocks = measured(tmp_path, {"original": 0.0, "cpt": 0.15}, 5)
    copy = blocks[blocks["variant"] == "original"].assign(variant="merge:a")
    (tmp_path / "samples" / "original").rename(tmp_path / "samples" / "merge:a")
    measured(tmp_path, {"original": 0.0, "cpt": 0.15}, 5)
    rows = table(tmp_path, pd.concat([blocks, copy]), 7).loc["merge:a"].loc["original"]
    assert (rows["difference"] == 0).all() and (rows["verdict"] == "cannot tell").all() and (rows["q"] == 1).all()


def test_equal_variants_are_seldom_told_apart(tmp_path):
    "Chance alone makes a verdict in some pair of at most about one comparison of two variants in twenty."
    told = 0
    for seed in range(60):
        g = np.random.default_rng(seed)
        p = [stats.mcnemar(g.random(100) < 0.5, g.random(100) < 0.5).p for _ in range(6)]
        told += any(stats.verdict(1.0, q) != "cannot tell" for q in stats.benjamini_hochberg(p))
    assert told <= 8
