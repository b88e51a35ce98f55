"""The front, the rule, and the whole merge stage on a tiny model."""
import gzip
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from domain_adapt.params import Select, UserError, validate
from domain_adapt.sweep import COLUMNS, choose, measure, merge_candidates, on_front


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
@settings(deadline=None)
def test_front_is_who_is_not_beaten(points):
    beaten = [any(all(x <= y for x, y in zip(q, p)) and q != p for q in points) for p in points]
    assert on_front(np.array(points, float)).tolist() == [not b for b in beaten]


def table(**rows):
    "name=(domain, general, retention, forgetting, on_front)"
    keys = ["domain_bits_per_byte", "general_bits_per_byte", "retention", "forgetting", "on_front"]
    method = lambda name: "none" if name in ("original", "cpt") else "linear"
    return pd.DataFrame([dict(zip(keys, v), name=n.replace("_", "-"), method=method(n)) for n, v in rows.items()])


class TestRule:
    rows = dict(original=(1.0, 1.0, 0.0, 0.0, True), cpt=(0.8, 1.1, 1.0, 0.1, True),
                a_30=(0.95, 0.99, 0.25, 0.0, True), b_50=(0.9, 1.003, 0.5, 0.003, True),
                c_70=(0.85, 1.02, 0.75, 0.02, True), d_off=(0.86, 1.03, 0.7, 0.004, False))

    def test_most_retained_within_the_limit_then_the_rest_of_the_front(self):
        s = choose(table(**self.rows), Select(max_forgetting=0.005, keep=2))
        assert s["winner"] == "b-50" and s["kept"] == ["b-50", "a-30"] and s["order"] == [*s["kept"], "c-70"]
        assert "0.005" in s["rule"] and "50%" in s["outcome"] and json.dumps(s, allow_nan=False)

    def test_limit_is_inclusive_and_zero_is_a_limit(self):
        assert choose(table(**self.rows), Select(max_forgetting=0.02))["winner"] == "c-70"
        assert choose(table(**self.rows), Select(max_forgetting=0.0))["order"] == ["a-30", "c-70", "b-50"]

    def test_none_within_the_limit_is_said(self):
        rows = {n: (d, g, r, 0.5 + d, f) for n, (d, g, r, _, f) in self.rows.items()}
        s = choose(table(**rows), Select())
        assert s["winner"] is None and s["kept"] == ["c-70", "b-50"]
        assert "c-70 forgets least, 1.3500" in s["outcome"]

    def test_off_the_front_only_for_want_of_better(self):
        rows = self.rows | dict(a_30=(0.95, 0.99, 0.25, 0.01, True), b_50=(0.9, 1.003, 0.5, 0.01, True))
        s = choose(table(**rows), Select(max_forgetting=0.005))
        assert s["winner"] == "d-off" and s["order"] == ["d-off", "c-70", "b-50", "a-30"]

    def test_ties_go_by_name_whatever_the_order_in_the_yaml(self):
        rows = dict(z=(0.9, 1.0, 0.5, 0.0, True), y=(0.9, 1.0, 0.5, 0.0, True), x=(0.95, 0.9, 0.2, 0.0, True))
        assert choose(table(**rows), Select())["order"] == ["y", "z", "x"]

    def test_without_general_text_nobody_wins(self):
        rows = {n: (d, math.nan, r, math.nan, f) for n, (d, _, r, _, f) in self.rows.items()}
        s = choose(table(**rows), Select())
        assert s["winner"] is None and "general text" in s["outcome"] and json.dumps(s, allow_nan=False)

    def test_undefined_retention_still_orders(self):
        rows = {n: (d, g, math.nan, o, f) for n, (d, g, _, o, f) in self.rows.items()}
        s = choose(table(**rows), Select(max_forgetting=0.005))
        assert s["order"] == ["b-50", "a-30", "c-70"] and "not clear of chance" in s["outcome"]

    def test_all_beaten_leaves_nothing(self):
        rows = {n: (*v[:3], 0.5, n in ("original", "cpt")) for n, v in self.rows.items()}
        s = choose(table(**rows), Select())
        assert s["order"] == s["kept"] == [] and s["winner"] is None


def test_measures_are_the_formulae():
    rng = np.random.default_rng(3)
    kinds, variants = {"sec": "domain", "wiki": "general", "news": "general"}, ["original", "cpt", "merge:m"]
    offset = {"original": {"sec": 0.3, "wiki": 0, "news": 0}, "cpt": {"sec": 0, "wiki": 0.1, "news": 0.05},
              "merge:m": {"sec": 0.1, "wiki": 0.02, "news": -0.04}}
    texts = {c: [(i // 2, i % 2, rng.integers(900, 1100), rng.normal(1, 0.05)) for i in range(50)] for c in kinds}
    blocks = pd.DataFrame([
        dict(variant=v, corpus=c, kind=kinds[c], document=d, block=b, bytes=size, nll=size * (rate + offset[v][c]))
        for v in variants for c in kinds for d, b, size, rate in texts[c]])
    groups = blocks.groupby(["variant", "corpus"])
    bits = {at: g.nll.sum() / g.bytes.sum() / math.log(2) for at, g in groups}
    general = {v: (bits[v, "wiki"] + bits[v, "news"]) / 2 for v in variants}
    found = measure(blocks, seed=0).loc["merge:m"]
    assert found.domain_bits_per_byte == pytest.approx(bits["merge:m", "sec"])
    assert found.general_bits_per_byte == pytest.approx(general["merge:m"])
    gain = bits["original", "sec"] - bits["cpt", "sec"]
    assert found.retention == pytest.approx((bits["original", "sec"] - bits["merge:m", "sec"]) / gain)
    lost = general["cpt"] - general["original"]
    assert found.recovery == pytest.approx((general["cpt"] - general["merge:m"]) / lost)
    assert found.forgetting == pytest.approx((bits["merge:m", "wiki"] - bits["original", "wiki"]) / 2)


CANDIDATES = [dict(name="linear-50", method="linear", weight=0.5),
              dict(name="slerp-50", method="slerp", t=0.5),
              dict(name="ties-70", method="ties", weight=0.7, density=0.5),
              dict(name="dare-70", method="dare_ties", weight=0.7, density=0.5)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_llama):
    "Folders of lower stages: a trained model (jittered), held-out text; and params(**changes)."
    at = tmp_path_factory.mktemp("stage")
    for step, seed in ((4, 1), (20, 2)):
        folder = shutil.copytree(tiny_llama, at / "train" / "hf" / f"step_{step}")
        g = torch.Generator().manual_seed(seed)
        file = folder / "model.safetensors"
        noise = lambda t: 0.01 * torch.randn(t.shape, generator=g)
        save_file({k: t + noise(t) for k, t in load_file(file).items()}, file)
    (at / "tokens").mkdir()
    words = "revenue cost of sales rose fell river harbour school painted by and the in fiscal 2025".split()
    for corpus, n in (("sec", 3), ("wiki", 30)):
        rng = np.random.default_rng(n)
        texts = [" ".join(rng.choice(words, 40)) for _ in range(n)]
        with gzip.open(at / "tokens" / f"{corpus}_heldout.jsonl.gz", "wt") as f:
            f.writelines(json.dumps({"id": f"{corpus}/{i}", "text": t}) + "\n" for i, t in enumerate(texts))

    def params(candidates=CANDIDATES, **changes):
        corpora = {"sec": dict(kind="domain", source="general", path="x", heldout=0.5),
                   "wiki": dict(kind="general", source="general", path="y", heldout=0.5)}
        return validate(dict(
            run="t", seed=3, model=str(tiny_llama), corpora=corpora,
            merge=dict(candidates=candidates, select={"max_forgetting": 0.5}),
            evaluate=dict(perplexity=dict(max_tokens=512, block=64), precision="fp32")) | changes)
    return {"train": at / "train", "tokens": at / "tokens"}, params


@pytest.fixture(scope="module")
def done(stage, tmp_path_factory):
    folders, params = stage
    out = tmp_path_factory.mktemp("merge")
    merge_candidates(params(), folders, out)
    return out


class TestStage:
    def test_files_and_columns(self, done):
        assert {f.name for f in done.iterdir()} == {c["name"] for c in CANDIDATES} | {
            "geometry.csv", "blocks.csv", "sweep.csv", "selection.json"}
        sweep = pd.read_csv(done / "sweep.csv")
        assert list(sweep) == COLUMNS
        assert list(sweep["name"]) == ["original", "cpt", *(c["name"] for c in CANDIDATES)]
        assert json.loads(sweep.set_index("name").parameters["dare-70"]) == {
            "weight": 0.7, "density": 0.5, "normalize": False, "seed": 3}
        assert np.isfinite(sweep[["domain_bits_per_byte", "general_bits_per_byte"]]).all(axis=None)
        assert sweep.on_front.any()

    def test_select_half_of_every_variant_and_no_other(self, done):
        blocks = pd.read_csv(done / "blocks.csv")
        assert set(blocks.half) == {"select"} and set(blocks.dtype) == {"fp32"}
        assert set(blocks.variant) == {"original", "cpt"} | {f"merge:{c['name']}" for c in CANDIDATES}
        assert blocks.groupby("variant").size().nunique() == 1

    def test_the_choice_tells_its_rule_and_the_cancellation(self, done):
        chosen = json.loads((done / "selection.json").read_text())
        assert set(chosen["notes"]) == {"ties-70", "dare-70"} and chosen["rule"]
        assert "normalize: false is used" in chosen["notes"]["ties-70"]
        assert set(chosen["kept"]) <= set(chosen["order"]) <= {c["name"] for c in CANDIDATES}

    @pytest.mark.equality
    def test_again_gives_the_same_bytes(self, done, stage, tmp_path):
        folders, params = stage
        merge_candidates(params(), folders, tmp_path)
        files = ("sweep.csv", "blocks.csv", "geometry.csv", "selection.json", "dare-70/model.safetensors")
        assert [(done / f).read_bytes() for f in files] == [(tmp_path / f).read_bytes() for f in files]

    def test_a_merge_that_is_the_original_scores_as_it(self, stage, tmp_path):
        folders, params = stage
        merge_candidates(params([dict(name="same", method="slerp", t=0.0)]), folders, tmp_path)
        sweep = pd.read_csv(tmp_path / "sweep.csv").set_index("name")
        assert sweep.domain_bits_per_byte["same"] == sweep.domain_bits_per_byte["original"]
        assert "equals the original" in json.loads((tmp_path / "selection.json").read_text())["notes"]["same"]

    def test_a_base_that_is_a_copy_of_the_model(self, stage, tiny_llama, tmp_path):
        folders, params = stage
        base = shutil.copytree(tiny_llama, tmp_path / "base")
        (tmp_path / "out").mkdir()
        merge_candidates(params(CANDIDATES[2:3], base=str(base)), folders, tmp_path / "out")
        note = json.loads((tmp_path / "out" / "selection.json").read_text())["notes"]["ties-70"]
        assert "the original is the base" in note and "normalize: false is used" in note

    def test_a_true_sibling_is_the_base(self, stage, tmp_path):
        folders, params = stage
        sibling = str(folders["train"] / "hf" / "step_4")
        merge_candidates(params(CANDIDATES[2:3], base=sibling), folders, tmp_path)
        text = (tmp_path / "ties-70" / "mergekit_config.yml").read_text()
        assert "base_model: base" in text and "normalize: true" in text
        assert json.loads((tmp_path / "selection.json").read_text())["notes"] == {}


class TestRefused:
    def test_no_held_out_domain_text(self, stage, tmp_path):
        folders, params = stage
        tokens = shutil.copytree(folders["tokens"], tmp_path / "tokens")
        (tokens / "sec_heldout.jsonl.gz").unlink()
        with pytest.raises(UserError, match="heldout"):
            merge_candidates(params(), folders | {"tokens": tokens}, tmp_path)

    def test_no_export(self, stage, tmp_path):
        folders, params = stage
        with pytest.raises(UserError, match="step_<n>"):
            merge_candidates(params(), folders | {"train": tmp_path}, tmp_path)
