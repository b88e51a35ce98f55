"""Figures: the same table gives the same picture, marks lie where the table says, labels do not collide."""
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

import made_run
from domain_adapt import figures

RNG = np.random.default_rng(1)
BLOCKS = made_run.blocks(np.random.default_rng(0))
PERPLEXITY = made_run.perplexity(BLOCKS)
SCORES = made_run.benchmarks(np.random.default_rng(0))


def tradeoff(n: int, seed: int) -> pd.DataFrame:
    "A cloud of `n` merges around original and CPT, as crowded as sweeps get."
    g = np.random.default_rng(seed)
    gain, lost = np.r_[0, 11, g.uniform(8, 11, n)], np.r_[0, 1.7, g.uniform(-.5, 1.7, n)]
    t = pd.DataFrame(dict(variant=["original", "cpt", *(f"merge:candidate-{i}" for i in range(n))],
                          gain=gain, gain_low=gain - .3,
                          gain_high=gain + .3, forgetting=lost, forgetting_low=lost - .1,
                          forgetting_high=lost + .1))
    return t.assign(on_front=figures.front(t["gain"], t["forgetting"]))


@pytest.mark.equality
@pytest.mark.parametrize("draw", [
    lambda w: figures.tradeoff(tradeoff(6, 0), width=w), lambda w: figures.perplexity(PERPLEXITY, "general",
                                                                                      width=w),
    lambda w: figures.benchmarks(SCORES, width=w)], ids=["tradeoff", "perplexity", "benchmarks"])
def test_the_same_table_gives_the_same_file(draw):
    assert figures.svg(draw(7.4)) == figures.svg(draw(7.4)) != figures.svg(draw(3.8))


def test_marks_lie_where_the_table_says():
    t = tradeoff(4, 0)
    drawn = {(x, y) for line in figures.tradeoff(t).axes[0].lines for x, y in zip(*line.get_data())
             if line.get_marker() != "None"}
    assert drawn == set(zip(t["forgetting"], t["gain"]))


def test_perplexity_shows_the_reported_half_and_its_intervals():
    t = PERPLEXITY.query("kind == 'domain' and half == 'report'").set_index("variant")
    lines = figures.perplexity(PERPLEXITY, "domain").axes[0].lines
    marks = [line.get_xdata()[0] for line in lines if line.get_marker() != "None"]
    bars = [tuple(line.get_xdata()) for line in lines if line.get_marker() == "None"
            and len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
    order = figures.in_order(t.index)
    assert marks == [t.loc[v, "bits_per_byte"] for v in order]
    assert set(bars) >= {(t.loc[v, "ci_low"], t.loc[v, "ci_high"]) for v in order}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [7.4, 3.8])
def test_labels_of_variants_do_not_overlap(seed, width):
    fig = figures.tradeoff(tradeoff(9, seed), width=width)
    fig.canvas.draw()
    names = {"original", "cpt", *(f"candidate-{i}" for i in range(9))}
    boxes = [t.get_window_extent() for t in fig.axes[0].texts if t.get_text() in names]
    assert len(boxes) == 11
    frame = fig.bbox
    for i, a in enumerate(boxes):
        assert frame.x0 <= a.x0 and a.x1 <= frame.x1 and frame.y0 <= a.y0 and a.y1 <= frame.y1
        assert not any(a.shrunk(.9, .8).overlaps(b.shrunk(.9, .8)) for b in boxes[i + 1:])


@given(st.lists(st.floats(-100, 100), max_size=30), st.floats(.01, 10))
@settings(deadline=None)
def test_spread_keeps_order_and_distance(wanted, gap):
    placed = figures.spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= gap - 1e-6).all()
    if (np.diff(np.asarray(wanted)[order]) >= gap).all(): np.testing.assert_allclose(placed, wanted,
                                                                                     atol=1e-6)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12))
@settings(deadline=None)
def test_front_is_what_nothing_beats(points):
    gain, lost = zip(*points)
    beaten = [any(g >= a and f <= b and (g, f) != (a, b) for g, f in points) for a, b in points]
    assert figures.front(gain, lost).tolist() == [not x for x in beaten]


def luminance(colour: str) -> float:
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722])


@pytest.mark.parametrize("ground", ["#ffffff", "#121212"])
def test_colours_stand_out_on_both_grounds(ground):
    "WCAG asks 3 to 1 of graphics."
    for colour in [*figures.FAMILIES.values(), *figures.KINDS.values(), *figures.PARTS.values()]:
        light, dark = sorted([luminance(colour), luminance(ground)], reverse=True)
        assert (light + .05) / (dark + .05) >= 3, colour


SEEN_BY = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "protan": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    "deutan": [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    "tritan": [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}


@pytest.mark.parametrize("eye", SEEN_BY)
def test_families_differ_for_colour_blind_eyes(eye):
    "Original, base, CPT and merge stay apart in Lab; the two CPT tones differ by open and filled marks."
    def seen(colour):
        linear = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
        x, y, z = (np.array([[.4124, .3576, .1805], [.2126, .7152, .0722],
                             [.0193, .1192, .9505]]) @ np.clip(np.array(SEEN_BY[eye]) @ linear, 0,
                                                               1)) / [.9505, 1, 1.089]
        f = np.cbrt([x, y, z])
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    tones = [seen(figures.FAMILIES[f]) for f in ("original", "base", "cpt", "merge:")]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(tones) for b in tones[i + 1:]) > 15


def test_text_of_a_table_cannot_become_markup():
    for x in (made_run.NASTY, "</td><td>"):
        page = figures.table_html(pd.DataFrame({x: [x]}), x)
        assert "<script" not in page and "<img" not in page and page.count("<td") == 1


@pytest.mark.parametrize("draw", [figures.funnel, figures.loss, figures.mixture,
                                  lambda t: figures.perplexity(t, "domain"), figures.benchmarks,
                                  figures.tradeoff, figures.sweep, figures.geometry])
def test_an_empty_table_says_that_it_is_empty(draw):
    assert "the table is empty" in figures.svg(draw(pd.DataFrame()))


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.svg(figures.tradeoff(tradeoff(2, 0)))
    assert dict(matplotlib.rcParams) == before


def test_importing_figures_is_light():
    code = "import sys, domain_adapt.figures, domain_adapt.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "sphinx"} & set(done.stdout.split())
