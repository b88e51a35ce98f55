"""Predictions, what was measured, and the land around the merges: against merges that mergekit really makes."""
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from domain_adapt.geometry import geometry
from domain_adapt.landscape import (SAME_SHARE, _weights, confront, density_curve, density_sentence, plane, plane_sentence,
                                     predictions)
from domain_adapt.merge import merge
from domain_adapt.perplexity import COLUMNS
from domain_adapt.recipe import Recipe


@pytest.fixture(scope="module")
def family(tmp_path_factory, make_model):
    "A base, the original half a step off it, a CPT model one step further, another half-way, with layers of random weights."
    at = tmp_path_factory.mktemp("landscape")
    make_model(at / "base")
    tensors, g = load_file(at / "base" / "model.safetensors"), torch.Generator().manual_seed(1)
    step = lambda far: {k: far * torch.randn(t.shape, generator=g) for k, t in tensors.items()}
    first, second = step(0.004), step(0.008)
    for name, parts in (("original", (first,)), ("cpt", (second,)), ("cpt@4", (first, second))):
        shutil.copytree(at / "base", at / name)
        save_file({k: t + sum(p[k] for p in parts) / len(parts) for k, t in tensors.items()}, at / name / "model.safetensors")
    return {name: at / name for name in ("base", "original", "cpt", "cpt@4")}


def vector(folder) -> torch.Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(load_file(folder / "model.safetensors").items())])


def scorer(models, at):
    "A score that really merges: on domain text it is the distance from CPT's weights, on general from the original's."
    ends, made = {"domain": vector(models["cpt"]), "general": vector(models["original"])}, {}
    noise = np.random.default_rng(0).normal(1, .01, 20)
    def score(recipe: Recipe) -> pd.DataFrame:
        merge(recipe, models, at / recipe.name)
        made[recipe.name] = vector(at / recipe.name)
        shutil.rmtree(at / recipe.name)
        rows = [dict(variant="?", corpus=kind, kind=kind, half="select", document=d, block=0, tokens=8, bytes=100, words=9, dtype="fp32",
                     nll=(1 + float((made[recipe.name] - end).norm())) * n * 100 * np.log(2))
                for kind, end in ends.items() for d, n in enumerate(noise)]
        return pd.DataFrame(rows)[COLUMNS]
    return score, made


@pytest.mark.oracle
@pytest.mark.parametrize("models", [("base", "original", "cpt"), ("original", "cpt", "cpt@4"), ("original", "cpt")])
def test_the_sentences_hold_what_the_merges_themselves_show(family, tmp_path, models):
    models = {m: family[m] for m in models}
    table = predictions(geometry(models, next(iter(models))))
    assert table.claim.isin(["slerp", "ties", "elections"]).all() and not table.prediction.str.contains("nan").any()
    for row in table[table.claim == "slerp"].itertuples():
        there = {"original": models[row.model], "cpt": models[row.against]}
        entries = [{"model": m, "parameters": {"weight": .5}} for m in there]
        half = {"slerp": dict(base_model="original", models=[{"model": m} for m in there], parameters={"t": .5}),
                "linear": dict(models=entries)}
        for method, config in half.items(): merge(Recipe(method, dict(merge_method=method, dtype="float32", **config), {}), there,
                                                  tmp_path / f"{method}{row.Index}")
        slerp, linear = (vector(tmp_path / f"{m}{row.Index}") for m in half)
        apart = (vector(there["original"]) - vector(there["cpt"])).norm()
        assert row.value == pytest.approx(float((slerp - linear).norm() / apart), rel=2e-2, abs=1e-5)
        assert row.expected == ("same" if row.value <= SAME_SHARE else "differs")


def test_a_sibling_has_something_to_elect_and_a_lone_task_vector_has_not(family):
    table = predictions(geometry({m: family[m] for m in ("base", "original", "cpt")}, "base")).set_index(["claim", "model"])
    ties, elected = table.loc[("ties", "original")], table.loc[("elections", "original")]
    assert "nearly orthogonal" in ties.prediction and "much to resolve" in ties.prediction and ties.value == pytest.approx(.5, abs=.05)
    assert elected.expected == "cpt" and .6 < elected.value < .8 and "2 times as long" in elected.prediction
    alone = predictions(geometry({m: family[m] for m in ("original", "cpt")}, "original")).set_index("claim")
    assert list(alone.index) == ["slerp", "ties"] and "only trims" in alone.prediction["ties"]


def test_models_that_are_the_same_give_sentences_too(family):
    table = predictions(geometry({"original": family["original"], "cpt": family["original"], "other": family["original"]}, "original"))
    assert len(table) == 7 and set(table.expected) == {"same", ""} and not table.prediction.str.contains("nan|inf").any()


def blocks(bits: dict, seed: int = 0) -> pd.DataFrame:
    noise = np.random.default_rng(seed).normal(1, .02, (len(bits), 25))
    return pd.DataFrame([dict(variant=f"merge:{v}", corpus=c, kind=kind, document=d, block=0, bytes=100, nll=b * n * 100 * np.log(2))
                         for (v, b), line in zip(bits.items(), noise) for c, kind in (("a", "domain"), ("b", "domain"), ("c", "general"))
                         for d, n in enumerate(line)])


def sweep(**settings) -> pd.DataFrame:
    return pd.DataFrame([(n.replace("_", "-"), m, json.dumps(p)) for n, (m, p) in settings.items()], columns=["name", "method", "parameters"])


def test_only_merges_of_equal_weights_are_held_against_each_other(family):
    told = predictions(geometry({m: family[m] for m in ("base", "original", "cpt")}, "base"))
    tried = sweep(linear_3=("linear", {"weight": .3}), slerp_5=("slerp", {"t": .5}), slerp_3=("slerp", {"t": .3}), original=("none", {}),
                  ties_3=("ties", {"weight": .3, "density": 1.}), ties_5=("ties", {"weight": .5, "density": 1.}),
                  deep=("ties", {"weight": [.3, .5], "density": [.2, .5]}), whole=("mergekit", {}))
    scored = blocks({n: 1. for n in tried.name})
    seen = confront(told, scored, tried, seed=0)
    pairs = seen.dropna(subset="candidate")[["claim", "candidate", "held_against", "kind"]]
    assert pairs.to_numpy().tolist() == [[c, f"{c}-3", "linear-3", kind] for c in ("slerp", "ties") for kind in ("domain", "general")]
    assert (seen[seen.candidate.isna()].verdict == "not measured").all() and list(seen.columns[:6]) == list(told.columns)
    assert set(seen.prediction) == set(told.prediction)


@settings(max_examples=40, deadline=None)
@given(st.floats(.5, 1.5), st.floats(.5, 1.5), st.sampled_from([1., .5]))
def test_verdicts_follow_the_interval_and_never_blame_what_trimming_may_have_done(linear, ties, density):
    told = pd.DataFrame([("ties", "original", "cpt", .5, "differs", "."), ("elections", "original", "cpt", .7, "cpt", ".")],
                        columns=["claim", "model", "against", "value", "expected", "prediction"])
    tried = sweep(linear=("linear", {"weight": .5}), ties=("ties", {"weight": .5, "density": density}))
    seen = confront(told, blocks({"linear": linear, "ties": ties}), tried, seed=0)
    assert seen.claim.tolist() == ["ties", "ties", "elections"]
    for r in seen.itertuples():
        assert r.ci_low <= r.difference <= r.ci_high and r.difference == pytest.approx(ties - linear, abs=.05)
        clear = r.ci_low > 0 or r.ci_high < 0
        if density < 1 or not clear: assert r.verdict in ("cannot tell", "fails" if not clear and r.claim == "ties" else "cannot tell")
        elif r.claim == "elections": assert r.verdict == ("holds" if r.difference < 0 else "fails")
        else: assert r.verdict == "holds" or abs(r.ci_high) <= .002 or abs(r.ci_low) <= .002


@pytest.mark.oracle
def test_the_density_curve_starts_at_the_base_and_ends_at_the_model(family, tmp_path):
    models = {m: family[m] for m in ("original", "cpt")}
    score, made = scorer(models, tmp_path)
    curve = density_curve(score, [0., .1, .5], ["cpt"], "original", dtype="float32", seed=0)
    o, x = vector(models["original"]), vector(models["cpt"])
    torch.testing.assert_close(made["ties cpt 0"], o, rtol=0, atol=0)
    torch.testing.assert_close(made["ties cpt 1"], x, rtol=0, atol=1e-7)
    kept = ((made["ties cpt 0.1"] - o).abs() > 0).double().mean()
    assert kept == pytest.approx(.1, abs=.01)
    domain, general = (curve[curve.kind == k].set_index("density") for k in ("domain", "general"))
    assert domain.bits_per_byte.is_monotonic_decreasing and general.bits_per_byte.is_monotonic_increasing
    assert (domain.ci_low < domain.bits_per_byte).all() and (curve.tokens == 160).all()
    assert domain.difference[1] == 0 and np.allclose(domain.difference, domain.bits_per_byte - domain.bits_per_byte[1])
    said = density_sentence(curve)
    assert "On domain text no density below 1 beats" in said and "On general text cpt does best at density 0 of 4 tried" in said
    assert said.endswith("beyond chance.")


@pytest.mark.oracle
def test_two_task_vectors_are_trimmed_in_turn_and_the_whole_merge_is_made_once(family, tmp_path):
    models = {m: family[m] for m in ("base", "original", "cpt")}
    score, made = scorer(models, tmp_path)
    curve = density_curve(score, [.2, 1.], ["cpt", "original"], "base", dtype="float32", seed=0)
    assert len(made) == 3 and len(curve) == 8
    o, d, e = vector(models["base"]), *(vector(models[m]) - vector(models["base"]) for m in ("cpt", "original"))
    agree = d * e > 0
    elected = torch.where(agree, (d + e) / 2, torch.where(d.abs() > e.abs(), d, e))
    torch.testing.assert_close(made["ties cpt 1 original 1"], o + elected, rtol=0, atol=1e-6)
    both = curve[curve.density == 1].groupby("kind").bits_per_byte
    assert (both.nunique() == 1).all()


@pytest.mark.oracle
def test_the_plane_is_made_of_weighted_means(family, tmp_path):
    models = {m: family[m] for m in ("original", "cpt@4", "cpt")}
    score, made = scorer(models, tmp_path)
    table = plane(score, list(models), 4, dtype="float32", seed=0)
    ends = torch.stack([vector(f) for f in models.values()])
    weights = table[table.kind == "domain"][list(models)].to_numpy()
    for i, w in enumerate(weights):
        torch.testing.assert_close(made[f"plane {i}"], torch.tensor(w) @ ends, rtol=0, atol=1e-6)
    assert weights.min() == -.25 and weights.max() <= 1.25 and (weights[:3] == np.eye(3)).all()
    domain = table[table.kind == "domain"]
    assert domain.bits_per_byte.idxmin() == domain.index[2] and domain.difference[domain.index[2]] == 0
    assert ((table.difference_low <= table.difference) & (table.difference <= table.difference_high)).all()
    assert "at a corner: 1 cpt." in plane_sentence(table)                     # where the distance is zero
    pd.testing.assert_frame_equal(pd.read_csv(saved(table, tmp_path)), table)  # plane_sentence takes it from the file


def saved(table, at):
    table.to_csv(at / "t.csv", index=False)
    return at / "t.csv"


@given(st.integers(1, 41))
@settings(deadline=None, max_examples=41)
def test_points_of_the_plane_sum_to_one_and_keep_the_corners(points):
    w = _weights(points)
    assert np.allclose(w.sum(1), 1) and w.min() >= -.25 - 1e-9 and w.max() <= 1.25 + 1e-9
    assert (w[:3] == np.eye(3)).all() and len(np.unique(w, axis=0)) == len(w)


def surface(bits) -> pd.DataFrame:
    w = _weights(13)
    value = np.array([bits(*x) for x in w])
    below = value - value[:3].min()
    return pd.DataFrame(w, columns=["a", "b", "c"]).assign(kind="domain", bits_per_byte=value, difference=below,
                                                           difference_low=below - .01, difference_high=below + .01)


def test_the_plane_is_called_filled_only_where_nothing_stands_out():
    bowl, ridge = lambda a, b, c: 1 + a * a + b * b + c * c, lambda a, b, c: 1 - a * b
    assert re.search(r"is filled .* none of \d+ .* lies inside", plane_sentence(surface(bowl)))
    assert "is filled" in plane_sentence(surface(lambda a, b, c: 1 + a)) and "beyond its edges" in plane_sentence(surface(lambda a, b, c: 1 + a))
    assert "is filled" in plane_sentence(surface(ridge))
    assert re.search(r"is not filled .*: \d+ of \d+ .* by up to 0\.2500", plane_sentence(surface(lambda a, b, c: 1 + a * b)))
    assert "is filled" in plane_sentence(surface(lambda a, b, c: 1 + .007 * a * b))       # 0.00175 high at most
    burst = surface(bowl).assign(bits_per_byte=lambda t: t.bits_per_byte.where(t.a >= 0, np.nan).where(t.b >= 0, np.inf))
    assert "is filled" in plane_sentence(burst) and "lies inside" in plane_sentence(burst)
    assert plane_sentence(pd.DataFrame(columns=["kind"])) == "No plane was measured."
    assert density_sentence(pd.DataFrame(columns=["model", "density"])) == "No density was measured."
    few = surface(bowl)
    assert "no merge inside" in plane_sentence(few[:3])
