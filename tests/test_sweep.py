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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from domain_adapt import sweep
from domain_adapt.stats import read_blocks
from domain_adapt.merge import merge
from domain_adapt.params import Merge, Select, UserError, validate
from domain_adapt.recipe import recipes
from domain_adapt.runs import write_csv
from domain_adapt.search import Scorer, candidates, sources
from domain_adapt.sweep import BEHIND, COLUMNS, choose, foreseen, measure, merge_candidates, on_front, preview


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
@settings(deadline=None)
def test_front_is_who_is_not_beaten(points):
    beaten = [any(all(x <= y for x, y in zip(q, p)) and q != p for q in points) for p in points]
    assert on_front(np.array(points, float)).tolist() == [not b for b in beaten]
    burst = [*points, (math.nan, 0), (math.nan, math.nan)]
    assert on_front(np.array(burst, float)).tolist() == [*(not b for b in beaten), False, False]


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


def test_a_bursting_merge_does_not_spoil_the_other_rows_of_its_file(tmp_path):
    rows = pd.DataFrame(dict(variant=["a", "b"], corpus="NA", document=["1", "2"], block=0, nll=[0.1 + 0.2, math.nan]))
    write_csv(tmp_path / "blocks.csv", rows)
    assert read_blocks(tmp_path / "blocks.csv").equals(rows)


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


FILES = {"geometry.csv", "weights.csv", "blocks.csv", "sweep.csv", "seeds.csv", "predictions.csv", "density.csv", "plane.csv", "selection.json"}
ALL = dict(grid=[dict(method="linear", weight=[0.3, [0.2, 0.8]])], search=dict(trials=4, depth=2), max_tokens=700,
           landscape=dict(densities=[0.5], plane=3, max_tokens=200))


def chosen(folder): return json.loads((folder / "selection.json").read_text())


class TestStage:
    def test_files_and_columns(self, done):
        assert {f.name for f in done.iterdir()} == set(chosen(done)["kept"]) | FILES and chosen(done)["kept"]
        sweep = pd.read_csv(done / "sweep.csv")
        assert list(sweep) == [*COLUMNS, *BEHIND]
        assert list(sweep["name"]) == ["original", "cpt", *(c["name"] for c in CANDIDATES)]
        assert json.loads(sweep.set_index("name").parameters["dare-70"]) == {
            "weight": 0.7, "density": 0.5, "normalize": False, "seed": 3}
        measured = sweep[["domain_bits_per_byte", "general_bits_per_byte", *BEHIND[1:-1]]]
        assert np.isfinite(measured).all(axis=None) and sweep.on_front.any()
        for k in ("domain", "general"):
            assert sweep[f"{k}_bits_per_byte"].between(sweep[f"{k}_low"], sweep[f"{k}_high"]).all()

    def test_every_seed_of_a_mask_is_scored_and_the_first_stands_in_the_sweep(self, done):
        seeds, sweep = pd.read_csv(done / "seeds.csv"), pd.read_csv(done / "sweep.csv").set_index("name")
        assert seeds["name"].unique().tolist() == ["dare-70"] and seeds["seed"].tolist() == [3, 4, 5]
        assert seeds["domain_bits_per_byte"].nunique() == 3
        assert seeds["domain_bits_per_byte"][0] == sweep["domain_bits_per_byte"]["dare-70"]

    def test_select_half_of_every_variant_and_no_other(self, done):
        blocks = pd.read_csv(done / "blocks.csv")
        assert set(blocks.half) == {"select"} and set(blocks.dtype) == {"fp32"}
        assert set(blocks.variant) == {"original", "cpt", "merge:dare-70@4", "merge:dare-70@5"} | {f"merge:{c['name']}" for c in CANDIDATES}
        assert blocks.groupby("variant").size().nunique() == 1
        assert chosen(done)["scored_on"] == blocks[blocks.variant == "cpt"].groupby("corpus", sort=False).size().to_dict()

    def test_the_choice_tells_its_rule_and_the_cancellation(self, done):
        told = chosen(done)
        assert {"ties-70", "dare-70"} <= set(told["notes"]) and told["rule"] and told["failed"] == {}
        assert "normalize: false is used" in told["notes"]["ties-70"]
        assert set(told["kept"]) <= set(told["order"]) <= {c["name"] for c in CANDIDATES}

    @pytest.mark.equality
    def test_again_gives_the_same_bytes_grid_search_and_landscape_too(self, stage, tmp_path):
        folders, params = stage
        every = params()
        every = every.model_copy(update={"merge": Merge.model_validate(every.merge.model_dump() | ALL)})
        for at in ("a", "b"):
            (tmp_path / at).mkdir()
            merge_candidates(every, folders, tmp_path / at)
        files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*") if f.is_file())
        assert files == sorted(f.relative_to(tmp_path / "b") for f in (tmp_path / "b").rglob("*") if f.is_file())
        assert not [f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()]
        sweep = pd.read_csv(tmp_path / "a" / "sweep.csv")
        assert sweep["source"].value_counts().to_dict() == {"listed": 4, "search": 4, "grid": 2}
        assert {"linear-w0.3", "linear-w0.2_0.8", "search-0", "search-3"} <= set(sweep["name"])
        assert pd.read_csv(tmp_path / "a" / "seeds.csv").groupby("name").size().loc["dare-70"] == 3
        assert set(pd.read_csv(tmp_path / "a" / "plane.csv")) >= {"cpt@4", "original", "cpt", "kind", "bits_per_byte"}
        assert set(pd.read_csv(tmp_path / "a" / "density.csv")["density"]) == {0.5, 1.0}

    def test_nothing_is_written_while_candidates_are_scored(self, stage, tmp_path, monkeypatch):
        folders, params = stage
        seen, real = [], Scorer.__call__
        monkeypatch.setattr(Scorer, "__call__", lambda *words: seen.append(sorted(f.name for f in tmp_path.iterdir())) or real(*words))
        merge_candidates(params(), folders, tmp_path)
        assert len(seen) == 6 and all(names == ["geometry.csv"] for names in seen)

    @pytest.mark.equality
    def test_a_merge_in_memory_scores_as_the_same_on_the_disk(self, stage, tiny_llama, tmp_path):
        folders, params = stage
        models, _ = sources(params(), folders["train"])
        score = Scorer(params(), folders["tokens"], models)
        for c in params().merge.candidates:
            recipe = recipes(c, seed=3)[0]
            merge(recipe, models, tmp_path / c.name)
            assert score(recipe)["nll"].tolist() == score.folder(tmp_path / c.name, "x")["nll"].tolist()

    def test_other_models_and_checkpoints_can_be_named(self, stage, make_model, tmp_path):
        folders, params = stage
        make_model(tmp_path / "other", seed=5)
        (tmp_path / "out").mkdir()
        own = dict(merge_method="linear", models=[dict(model=m, parameters=dict(weight=w)) for m, w in (("cpt@4", 0.5), ("other", 0.1), ("cpt", 0.4))], dtype="float32")
        asked = params([dict(name="three", mergekit=own)])
        asked = asked.model_copy(update={"merge": asked.merge.model_copy(update={"models": {"other": str(tmp_path / "other")}})})
        merge_candidates(asked, folders, tmp_path / "out")
        weights = pd.read_csv(tmp_path / "out" / "weights.csv")
        assert weights.groupby("model")["weight"].first().round(6).to_dict() == {"cpt": 0.4, "cpt@4": 0.5, "other": 0.1}
        own["models"][0]["model"] = "nobody"
        with pytest.raises(UserError, match="merge.candidates.three: there is no model nobody, other; there are original, cpt"):
            merge_candidates(params([dict(name="three", mergekit=own)]), folders, tmp_path / "out")

    def test_what_fails_its_checks_is_told_removed_and_replaced(self, stage, done, tmp_path, monkeypatch):
        folders, params = stage
        first = chosen(done)["kept"][0]
        real = sweep.merge
        def damaged(recipe, models, out):
            note = real(recipe, models, out)
            if recipe.name == first:
                weights = load_file(out / "model.safetensors")
                save_file({k: t * (1.01 if "norm" in k else 1) for k, t in weights.items()}, out / "model.safetensors")
            return note
        monkeypatch.setattr(sweep, "merge", damaged)
        merge_candidates(params(), folders, tmp_path)
        told = chosen(tmp_path)
        assert list(told["failed"]) == [first] and "as it was chosen" in told["failed"][first]
        assert first not in told["kept"] and told["winner"] != first and not (tmp_path / first).exists()
        assert {f.name for f in tmp_path.iterdir()} == set(told["kept"]) | FILES

    @pytest.mark.parametrize("said", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")])
    def test_a_full_disk_is_no_failed_merge(self, stage, tmp_path, monkeypatch, said):
        folders, params = stage
        def full(recipe, models, out): raise UserError(f"{out}: could not be written: {said}") from said
        monkeypatch.setattr(sweep, "merge", full)
        with pytest.raises(UserError, match="No space left"): merge_candidates(params(), folders, tmp_path)

    def test_a_merge_that_bursts_stands_behind_all_others_and_stops_nothing(self, stage, tmp_path, monkeypatch):
        folders, params = stage
        real, burst = Scorer.__call__, ("linear-50", "search-1")
        scored = lambda self, recipe, *blocks: real(self, recipe, *blocks).assign(**{"nll": math.nan} if recipe.name in burst else {})
        monkeypatch.setattr(Scorer, "__call__", scored)
        every = params(CANDIDATES[:2])
        merge_candidates(every.model_copy(update={"merge": Merge.model_validate(every.merge.model_dump() | dict(search=dict(trials=4)))}), folders, tmp_path)
        table = pd.read_csv(tmp_path / "sweep.csv").set_index("name")
        assert table.loc[list(burst), "domain_bits_per_byte"].isna().all() and not table.loc[list(burst), "on_front"].any()
        assert chosen(tmp_path)["kept"] and not set(burst) & set(chosen(tmp_path)["order"]) and chosen(tmp_path)["failed"] == {}

    def test_the_passages_are_of_the_blocks_that_merges_are_chosen_on(self, stage):
        folders, params = stage
        wide = params(evaluate=dict(perplexity=dict(max_tokens=512, block=128), precision="fp32"))
        score = Scorer(wide, folders["tokens"], sources(wide, folders["train"])[0])
        at = {(b.corpus, b.document, b.block): b for b in score.blocks}
        assert len(score.passages) == min(50, sum(-(-len(b.ids) // 64) for b in score.blocks))
        for p in score.passages:
            ids = at[p.corpus, p.document, p.block].ids
            assert any(ids[i:i + 64] == p.ids for i in range(0, len(ids), 64)) and p.bytes > 0

    def test_the_weights_are_shown_before_anything_is_merged(self, stage, done):
        folders, params = stage
        table, notes = preview(params(), folders)
        assert set(table["name"]) == {c["name"] for c in CANDIDATES} and "normalize: false is used" in notes["ties-70"]
        share = table[(table["name"] == "linear-50") & (table["model"] == "cpt")]["weight"]
        assert (share == 0.5).all() and len(share) > 4

    def test_what_the_lint_says_is_said_before_there_is_a_model(self, stage, tiny_llama):
        folders, params = stage
        config = json.loads((tiny_llama / "config.json").read_text())
        assert foreseen(params(), config) == preview(params(), folders)[1]
        del config["architectures"]    # as in the published shapes
        both = [*CANDIDATES, dict(name="half", mergekit=dict(merge_method="linear", models=[
            dict(model="cpt@50", parameters=dict(weight=0.5)), dict(model="cpt", parameters=dict(weight=1.0))], parameters=dict(normalize=False)))]
        assert "1.5" in foreseen(params(both, train=dict(steps=100)), config)["half"]
        with pytest.raises(UserError, match="merge.candidates.half: there is no model cpt@50; there are original, cpt$"):
            foreseen(params(both, train=dict(checkpoint="somebody/else")), config)

    def test_a_merge_that_is_the_original_scores_as_it(self, stage, tmp_path):
        folders, params = stage
        merge_candidates(params([dict(name="same", method="slerp", t=0.0)]), folders, tmp_path)
        table = pd.read_csv(tmp_path / "sweep.csv").set_index("name")
        assert table.domain_bits_per_byte["same"] == table.domain_bits_per_byte["original"]
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
    def test_what_cannot_be_merged_is_said_before_anything_is_scored(self, stage, tmp_path, monkeypatch):
        folders, params = stage
        monkeypatch.setattr(sweep, "Scorer", None)
        own = dict(merge_method="linear", models=[dict(model="nobody", parameters=dict(weight=1.0))], dtype="float32")
        with pytest.raises(UserError, match="merge.candidates.own: there is no model nobody"):
            merge_candidates(params([*CANDIDATES, dict(name="own", mergekit=own)]), folders, tmp_path)

    def test_the_searchs_names_are_its_own(self, stage):
        taken = stage[1]([dict(name="search-0", method="slerp", t=0.5)])
        taken = taken.model_copy(update={"merge": Merge.model_validate(taken.merge.model_dump() | dict(search={}))})
        with pytest.raises(UserError, match="merge.candidates.search-0: the search calls its own"): candidates(taken)

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


def test_what_is_looked_at_beside_original_and_cpt():
    third = lambda *names: sweep._third(dict.fromkeys(("original", *names, "cpt")))
    assert third("cpt@16", "chat", "base") == "base" and third("cpt@16", "chat") == "chat", "another training says more than a step on the way"
    assert third("cpt@8", "cpt@16", "cpt@24") == "cpt@16" and third() is None
