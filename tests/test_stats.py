"Intervals, paired tests and verdicts against known values, other implementations and what must hold of any data."
import subprocess
import sys
from math import comb, log

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from domain_adapt import stats

OPPOSITE = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}


def made(scores: dict[str, float], documents: int, blocks: int = 1, spread: float = 0.05, seed: int = 0) -> pd.DataFrame:
    g = np.random.default_rng(seed)
    size, noise = g.integers(500, 5000, (documents, blocks)), g.normal(0, spread, (len(scores), documents, blocks))
    return pd.DataFrame([dict(variant=v, corpus="sec", document=f"d{d}", block=b, bytes=size[d, b],
                              nll=size[d, b] * log(2) * (x + noise[i, d, b]))
                         for i, (v, x) in enumerate(scores.items()) for d in range(documents) for b in range(blocks)])


def test_the_measured_value_is_the_ratio_of_sums():
    b = made({"original": 0.9}, 30)
    assert stats.draws(b, 0)["sec"]["original"][0] == pytest.approx(b["nll"].sum() / b["bytes"].sum() / log(2), rel=1e-12)


@pytest.mark.oracle
def test_the_bootstrap_agrees_with_scipys():
    g = np.random.default_rng(3)
    size = g.integers(500, 5000, 200).astype(float)
    nats = size * g.normal(0.7, 0.2, 200)
    ours = stats.interval(stats.ratio_draws(nats[:, None], size, 0)[:, 0])
    theirs = scipy_stats.bootstrap((nats, size), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True,
                                   n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx(theirs, abs=0.05 * (theirs.high - theirs.low))


def test_few_units_are_widened_to_students_interval():
    g = np.random.default_rng(0)
    x = g.normal(5, 1, 8)
    low, high = stats.interval(stats.ratio_draws(x[:, None], np.ones(8), 0)[:, 0])
    exact = scipy_stats.t.interval(0.95, 7, x.mean(), x.std(ddof=1) / np.sqrt(8))
    assert (low, high) == pytest.approx(exact, abs=0.12 * (exact[1] - exact[0]))


def test_blocks_stand_in_for_few_documents():
    few, many = made({"a": 1.0}, 19, 3), made({"a": 1.0}, 20, 3)
    assert stats.units(few) == ["document", "block"] and stats.units(many) == ["document"]
    assert stats.unit_label(1) == "within one document" and stats.unit_label(19) == "within 19 documents" and stats.unit_label(20) == "over documents"


def test_one_block_has_no_interval_and_no_verdict():
    drawn = stats.draws(made({"original": 1.0, "cpt": 0.9}, 1), 0)["sec"]
    assert np.isnan(stats.interval(drawn["cpt"])).all()
    difference = stats.paired(drawn["cpt"], drawn["original"])
    assert np.isnan(difference.p) and difference.difference != 0
    assert stats.verdict(difference.difference, stats.benjamini_hochberg([difference.p])[0], True) == "cannot tell"


def test_variants_must_share_their_blocks():
    b = made({"original": 1.0, "cpt": 0.9}, 25)
    with pytest.raises(ValueError, match="sec: variants differ"): stats.draws(b.iloc[:-1], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_that_is_no_number_costs_its_variant_all_and_others_nothing(bad):
    b = pd.DataFrame([dict(variant=v, corpus="sec", document=d, block=0, bytes=1000, nll=700.0 + d) for v in ("a", "b") for d in range(25)])
    burst = b.assign(nll=b["nll"].where((b["variant"] == "a") | (b["document"] != 3), bad))
    found, whole = stats.draws(burst, 0)["sec"], stats.draws(b, 0)["sec"]
    assert np.isnan(found["b"]).all() and np.array_equal(found["a"], whole["a"])


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    b = made({"a": 1.0}, 25)
    one, two, other = (stats.draws(b, s)["sec"]["a"] for s in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_pairing_finds_what_two_intervals_side_by_side_hide():
    shared = np.random.default_rng(0).normal(0, 0.2, 40)
    b = pd.DataFrame([dict(variant=v, corpus="sec", document=d, block=0, bytes=1000, nll=1000 * log(2) * (x + shared[d] + 0.01 * (d % 3)))
                      for v, x in (("original", 1.0), ("cpt", 0.97)) for d in range(40)])
    drawn = stats.draws(b, 0)["sec"]
    assert stats.interval(drawn["cpt"])[1] > stats.interval(drawn["original"])[0]
    assert stats.paired(drawn["cpt"], drawn["original"]).p < 0.001


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(-0.2, 0.2))
def test_swapping_two_variants_mirrors_the_difference_and_flips_the_verdict(seed, documents, gain):
    drawn = stats.draws(made({"a": 1.0, "b": 1.0 + gain}, documents, seed=seed), seed)["sec"]
    there, back = stats.paired(drawn["a"], drawn["b"]), stats.paired(drawn["b"], drawn["a"])
    assert there.p == back.p and there.smallest_detectable == pytest.approx(back.smallest_detectable)
    assert there[:3] == pytest.approx((-back.difference, -back.ci_high, -back.ci_low))
    say = [stats.verdict(x.difference, x.p, True) for x in (there, back)]
    assert OPPOSITE[say[0]] == say[1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120))
def test_swapping_answers_mirrors_mcnemar_and_flips_the_verdict(answers):
    a, b = map(list, zip(*answers))
    there, back = stats.mcnemar(a, b), stats.mcnemar(b, a)
    assert there.p == back.p and there.difference == -back.difference
    assert there.smallest_detectable == back.smallest_detectable and (there.ci_low, there.ci_high) == pytest.approx((-back.ci_high, -back.ci_low))
    assert there.ci_low <= there.difference <= there.ci_high
    assert OPPOSITE[stats.verdict(there.difference, there.p)] == stats.verdict(back.difference, back.p)


@pytest.mark.oracle
@pytest.mark.parametrize("x, y, same", [(6, 16, 78), (0, 6, 4), (1, 9, 90), (5, 5, 0)])
def test_mcnemar_is_the_exact_binomial(x, y, same):
    a, b = [1] * x + [0] * y + [1] * same, [0] * x + [1] * y + [1] * same
    exact = min(1, 2 * sum(comb(x + y, i) for i in range(min(x, y) + 1)) / 2 ** (x + y))
    assert stats.mcnemar(a, b).p == pytest.approx(exact, rel=1e-12)


def test_the_paired_interval_of_accuracies_covers_what_it_should():
    g, covered = np.random.default_rng(0), []
    for _ in range(400):
        u = g.random(100)
        a, b = u < 0.5, (u > 0.1) & (u < 0.65)
        low, high = stats.mcnemar(a, b)[1:3]
        covered.append(low <= -0.05 <= high)
    assert 0.92 < np.mean(covered) < 0.985


def test_fewer_than_six_answers_apart_detect_nothing():
    a = np.ones(100, bool)
    assert stats.mcnemar(a, a).smallest_detectable == 0.06
    for k in range(12): assert (stats.mcnemar(a, np.arange(100) >= k).p < 0.05) == (k >= 6)


@pytest.mark.oracle
@pytest.mark.parametrize("right, n", [(0, 10), (55, 100), (100, 100), (1, 3)])
def test_wilson_is_the_score_interval(right, n):
    z, p = scipy_stats.norm.ppf(0.975), right / n
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert stats.wilson(right, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.oracle
def test_benjamini_and_hochbergs_own_example():
    p = [.0001, .0004, .0019, .0095, .0201, .0278, .0298, .0344, .0459, .3240, .4262, .5719, .6528, .7590, 1.0]
    q = stats.benjamini_hochberg(p)
    assert (q <= 0.05).sum() == 4 and q[0] == pytest.approx(.0015) and q[3] == pytest.approx(.0095 * 15 / 4)
    with_gap = stats.benjamini_hochberg(p[:5] + [np.nan] + p[5:])
    assert np.isnan(with_gap[5]) and np.array_equal(np.delete(with_gap, 5), q)
    assert np.isnan(stats.benjamini_hochberg([np.nan])).all() and len(stats.benjamini_hochberg([])) == 0


def test_verdicts():
    assert stats.verdict(0.1, 0.05) == "better" and stats.verdict(0.1, 0.05, True) == "worse"
    assert stats.verdict(0.1, 0.051) == stats.verdict(0.1, float("nan")) == stats.verdict(0.0, 0.001) == "cannot tell"
    assert stats.verdict(-3e-8, 0.0004, True) == "cannot tell" and stats.verdict(-3e-6, 0.0004, True) == "better"


def test_forgetting_never_counts_a_gain():
    before, after = [np.array([0.5, 0.5]), np.array([0.6, 0.6])], [np.array([0.4, 0.5]), np.array([0.9, 0.5])]
    assert stats.forgetting(before, after) == pytest.approx([0.05, 0.05])


def test_recovery_and_retention_are_shares_or_undefined():
    drawn = {v: -x for v, x in stats.draws(made({"before": 1.0, "cpt": 0.8, "half": 0.9}, 40, spread=0.01), 0)["sec"].items()}
    kept = stats.retention(drawn["before"], drawn["cpt"], drawn["half"])
    low, high = stats.interval(kept)
    assert low < 0.5 < high and kept[0] == pytest.approx(0.5, abs=0.05)
    assert stats.recovery(drawn["cpt"], drawn["before"], drawn["cpt"])[0] == 1
    assert np.isnan(stats.recovery(drawn["before"], drawn["cpt"], drawn["half"])).all()    # nothing was forgotten
    noise = {v: -x for v, x in stats.draws(made({"before": 1.0, "cpt": 1.0, "half": 0.9}, 40), 0)["sec"].items()}
    assert np.isnan(stats.retention(noise["before"], noise["cpt"], noise["half"])).all()


P = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(P, st.randoms(use_true_random=False))
def test_q_is_at_least_p_keeps_their_order_and_does_not_depend_on_it(p, random):
    q, order = stats.benjamini_hochberg(p), list(range(len(p)))
    assert (q >= np.array(p) - 1e-15).all() and (q <= 1).all() and q.max() == pytest.approx(max(p))
    assert (np.diff(q[np.argsort(p, kind="stable")]) >= 0).all()
    random.shuffle(order)
    assert stats.benjamini_hochberg([p[i] for i in order]) == pytest.approx(q[order])


@settings(max_examples=100, deadline=None)
@given(P, st.data())
def test_a_smaller_p_never_raises_a_q(p, data):
    at = data.draw(st.integers(0, len(p) - 1))
    less = p[:at] + [p[at] * data.draw(st.floats(0, 1))] + p[at + 1:]
    assert (stats.benjamini_hochberg(less) <= stats.benjamini_hochberg(p) + 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=60))
def test_paired_draws_mirror_each_other_even_where_they_are_equal(drawn):
    a, b = np.array(drawn, float).T
    there, back = stats.paired(a, b), stats.paired(b, a)
    assert (there.difference, there.p, there.smallest_detectable) == (-back.difference, back.p, back.smallest_detectable)
    assert (there.ci_low, there.ci_high) == pytest.approx((-back.ci_high, -back.ci_low)) and 0 < there.p <= 1
    assert stats.paired(a, a).p == 1 and stats.paired(a, a)[:3] == (0, 0, 0)


@pytest.mark.oracle
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_wilson_solves_the_score_equation_and_mirrors(n, data):
    right = data.draw(st.integers(0, n))
    z = scipy_stats.norm.ppf(0.975)
    for x in (found := stats.wilson(right, n)): assert n * (right / n - x) ** 2 == pytest.approx(z * z * x * (1 - x), abs=1e-8)
    assert found == pytest.approx(tuple(1 - x for x in reversed(stats.wilson(n - right, n))), abs=1e-12)
    assert 0 <= found[0] <= right / n <= found[1] <= 1


def test_a_difference_of_the_smallest_detectable_size_is_found_four_times_in_five(monkeypatch):
    monkeypatch.setattr(stats, "DRAWS", 1000)
    g, n, sd = np.random.default_rng(0), 60, 0.05
    gain, found, told = stats.POWER * sd / np.sqrt(n), [], []
    for seed in range(300):
        d = stats.ratio_draws(np.column_stack([g.normal(1 + gain, sd, n), np.ones(n)]), np.ones(n), seed)
        pair = stats.paired(d[:, 0], d[:, 1])
        found.append(pair.p < 0.05), told.append(pair.smallest_detectable)
    assert 0.73 < np.mean(found) < 0.87 and np.mean(told) == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize("n, apart", [(400, 0.2), (1000, 0.1), (2000, 0.3)])
def test_a_smallest_detectable_difference_in_accuracy_is_found_four_times_in_five(n, apart):
    gain = stats.POWER * np.sqrt(apart / (n + stats.POWER ** 2))    # solves gain = POWER * sqrt((apart - gain²) / n)
    g, found, told = np.random.default_rng(0), [], []
    for _ in range(300):
        u = g.random(n)
        pair = stats.mcnemar(u < (apart + gain) / 2, u > 1 - (apart - gain) / 2)
        found.append(pair.p < 0.05), told.append(pair.smallest_detectable)
    assert 0.7 < np.mean(found) < 0.86 and np.mean(told) == pytest.approx(gain, rel=0.05)    # exact p: a little under


def test_statistics_need_no_torch():
    code = "import sys, domain_adapt.stats; sys.exit(sorted(m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code.replace("sys.exit(sorted(", "assert not list((")]).returncode == 0
