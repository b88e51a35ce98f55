"""The D-CPT law against data whose law is known, and what it says where there is too little to know it from."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import law
from domain_adapt.params import UserError

TRUE = dict(E=2.1, B=8.0, eta=0.2, beta=0.35, C=0.3, gamma=0.4, epsilon=0.05)
SHARES = (0.0, 0.0141, 0.0714, 0.1429, 0.5, 0.9, 1.0)


def made(noise: float = 0.0, of_arm: float = 0.0, seed: int = 0, shares=SHARES, lengths=np.geomspace(5e3, 5e6, 8), true=TRUE) -> pd.DataFrame:
    "Points of a known law, with noise (relative) of each point and of each arm as a whole."
    rng = np.random.default_rng(seed)
    rows = [dict(arm=f"r{r:g}", share=r, tokens=d, off=o) for r in shares for o in [rng.normal(0, of_arm)] for d in lengths]
    points = pd.DataFrame(rows)
    return points.assign(loss=law.predict(true, points["share"], points["tokens"]) * np.exp(points["off"] + rng.normal(0, noise, len(points))))


@pytest.mark.oracle
def test_it_finds_the_parameters_of_data_without_noise():
    found = law.fit(made()).found
    for name, value in TRUE.items(): assert found[name] == pytest.approx(value, rel=0.05), (name, found)


@pytest.mark.oracle
def test_with_noise_it_finds_what_matters_the_loss():
    points = made(noise=2e-3, seed=3)
    found, truth = law.fit(points), made()["loss"]
    assert np.abs(law.fitted(points, found.found) / truth - 1).max() < 4e-3


@pytest.mark.oracle
def test_it_is_the_formula_of_the_paper():
    N, D, r = 7e9, 1e9, 0.3
    p = TRUE | dict(A=400.0, alpha=0.34)
    assert law.predict(p, r, D, N) == pytest.approx(2.1 + 400 / N ** .34 + 8 * r ** .2 / D ** .35 + .3 / (r + .05) ** .4)


@pytest.mark.oracle
def test_the_size_has_a_term_only_where_there_are_sizes():
    sizes = pd.concat([made().assign(parameters=n) for n in (1e8, 1e9, 8e9)], ignore_index=True)
    sizes["loss"] = law.predict(TRUE | dict(A=60.0, alpha=0.25), sizes["share"], sizes["tokens"], sizes["parameters"])
    assert "A" not in law.fit(made().assign(parameters=1e8)).found
    found = law.fit(sizes).found
    assert np.abs(law.fitted(sizes, found) / sizes["loss"] - 1).max() < 2e-3
    assert law.predict(found, .3, 1e6, 3e9) == pytest.approx(law.predict(TRUE | dict(A=60.0, alpha=0.25), .3, 1e6, 3e9), rel=5e-3)


@pytest.mark.oracle
@pytest.mark.parametrize("arm", ["r0.0714", "r0.1429", "r0.5"])
def test_a_ratio_it_has_not_seen(arm):
    points = made(noise=5e-4, seed=1)
    found = law.held_out(points, arm, draws=64)
    assert np.abs(found["predicted"] / found["loss"] - 1).max() < 0.01
    assert np.abs(found["predicted"] / found["loss"] - 1).mean() < np.abs(found["neighbours"] / found["loss"] - 1).mean(), "the law is curved, the line is not"


def test_the_line_between_neighbours_is_the_line():
    points = pd.DataFrame([dict(arm=a, share=s, tokens=5.0, loss=v) for a, s, v in (("a", 0.0, 4.0), ("b", 0.5, 2.0))])
    row = next(pd.DataFrame([dict(share=.25, tokens=5.0)]).itertuples())
    assert law._between(points, row) == 3.0
    assert np.isnan(law._between(points, row._replace(share=.75))) and np.isnan(law._between(points, row._replace(tokens=6.0)))


@pytest.mark.oracle
def test_its_interval_covers_the_truth_when_whole_arms_are_off():
    lengths, at = np.geomspace(5e3, 8e4, 4), (0.2, 4e4)
    covered = 0
    for seed in range(10):
        low, high = law.band(law.fit(made(2e-4, 2e-3, seed, lengths=lengths), draws=40, seed=seed, starts=4), *at)[1:]
        covered += low <= law.predict(TRUE, *at) <= high
    assert covered >= 7, f"{covered} of 10"


def test_an_interval_that_is_not_asked_for_is_not_there():
    assert np.isnan(law.band(law.fit(made()), .5, 1e5)[1:]).all()


def test_the_draws_are_all_the_ways_to_turn_arms_over():
    points = made(of_arm=1e-3, shares=SHARES[:4])
    drawn = law.resampled(points, law.fit(points), draws=16, seed=0)
    assert len(drawn) == 16 and len({tuple(d["loss"].round(9)) for d in drawn}) == 16
    assert len(law.resampled(points, law.fit(points), draws=5, seed=0)) == 5


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), tokens=st.floats(10, 1e12), more=st.floats(1, 100),
       p=st.fixed_dictionaries({n: st.floats(a, b) for n, (a, b) in law.BOUNDS.items() if n not in law.OF_SIZE}))
def test_more_tokens_never_raise_the_loss_and_it_never_falls_below_its_floor(share, tokens, more, p):
    loss, later = law.predict(p, share, tokens), law.predict(p, share, tokens * more)
    assert np.isfinite(loss) and p["E"] <= later <= loss


@settings(max_examples=5, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_the_unit_of_tokens_and_the_order_of_points_do_not_matter(scale, seed):
    points = made(noise=1e-3, seed=2, lengths=np.geomspace(5e3, 8e4, 5))
    other = points.assign(tokens=points["tokens"] * scale).sample(frac=1, random_state=seed)
    mine, theirs = law.fit(points, starts=8).found, law.fit(other, starts=8).found
    assert np.allclose(law.fitted(points, mine), law.fitted(other, theirs)[np.argsort(other.index)], rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(most=st.floats(2.2, 3.4), more=st.floats(0, 1))
def test_what_it_recommends_was_tried_and_a_laxer_limit_never_asks_for_more(most, more):
    same = law.Law(TRUE, 0, pd.DataFrame([TRUE]))
    strict, lax = (law.recommend(same, same, (0.0, 0.1, 0.5), 8e4, m) for m in (most, most + more))
    for r in (strict, lax): assert np.isnan(r["value"]) and r["possible"] == 0 or 0 <= r["low"] <= r["value"] <= r["high"] <= 0.5 and r["possible"] == 1
    assert np.isnan(strict["value"]) or lax["value"] <= strict["value"]


@pytest.mark.parametrize("points, why", [
    (made(shares=(0, .1, .5)), "at least 4 ratios, and there are 3"),
    (made(lengths=[5e4]), "same number of tokens"),
    (made(lengths=[5e4]).assign(tokens=[1., 2, 3, 4, 5, 6, 7]), "7 parameters and there are only 7 points"),
    (made().assign(loss=np.nan), "not a positive number"),
    (made().assign(loss=0.0), "not a positive number"),
])
def test_too_little_is_refused_with_the_reason(points, why):
    with pytest.raises(UserError, match=why): law.fit(points)


def test_two_fits_are_the_same():
    a, b = (law.fit(made(1e-3, lengths=[1e4, 4e4]), draws=8, starts=4) for _ in range(2))
    assert a.found == b.found and a.draws.equals(b.draws)
