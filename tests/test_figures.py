"""Figures: the same table gives the same picture, marks lie where the table says, labels do not collide."""
import re
import subprocess
import sys
import types
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

import made_run
from domain_adapt import figures, site
from domain_adapt.runs import notebook_path

RNG = np.random.default_rng(1)
BLOCKS = made_run.blocks(np.random.default_rng(0))
PERPLEXITY = made_run.perplexity(BLOCKS)
SCORES = made_run.benchmarks(np.random.default_rng(0))
METRICS = pd.DataFrame(made_run.metrics(np.random.default_rng(0)))
TRAINED = [figures.loss, figures.gradients, figures.pace]


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
    lambda w: figures.benchmarks(SCORES, width=w), *(lambda w, draw=draw: draw(METRICS, width=w) for draw in TRAINED)],
    ids=["tradeoff", "perplexity", "benchmarks", "loss", "gradients", "pace"])
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


def points(ax, marker: str = "None") -> list[tuple[float, float]]:
    return [(x, y) for line in ax.lines if line.get_marker() == marker for x, y in zip(*line.get_data())]


def test_the_loss_joins_what_was_learnt_from_and_crosses_the_rest():
    top, low = figures.loss(METRICS, {"sec": "domain"}).axes
    learnt, refused = (METRICS[METRICS["learnt"].eq(x)] for x in (True, False))
    lines = {tuple(zip(*line.get_data())) for line in top.lines}
    assert len(learnt) == 40 and tuple(zip(learnt["tokens"], learnt["loss"])) in lines
    for corpus in ("sec", "wiki", "news"):
        t = METRICS.dropna(subset=[f"heldout/{corpus}"])
        assert len(t) == 6 and tuple(zip(t["tokens"], t[f"heldout/{corpus}"])) in lines
    assert [x for x, _ in points(top, "x")] == list(refused["tokens"])
    assert top.get_ylim()[1] < 4                                      # the refused loss of 4.1 moves nothing
    rates = METRICS.dropna(subset=["lr"])
    np.testing.assert_allclose(low.lines[0].get_xydata()[1:], np.c_[rates["tokens"], rates["lr"] * 1e4])


def test_gradients_cross_a_spike_at_its_value_and_take_a_log_axis_for_it():
    ax = figures.gradients(METRICS).axes[0]
    assert ax.get_yscale() == "log" and (17, 61) in points(ax, "x")
    assert [x for x, _ in points(ax, "x")] == [17, 31]
    calm = METRICS[METRICS["learnt"].ne(False)]
    ax = figures.gradients(calm).axes[0]
    assert ax.get_yscale() == "linear" and ax.get_ylim()[0] == 0 and not points(ax, "x")


def test_pace_shows_what_the_table_holds():
    speed, used, memory = figures.pace(METRICS).axes
    t = METRICS.dropna(subset=["mfu"])
    for line, column, scale in ((speed.lines[0], "tokens_per_second", 1), (used.lines[0], "mfu", 100),
                                (used.lines[1], "mfu_with_attention", 100), (memory.lines[0], "memory_bytes", 1e-9)):
        drawn = line.get_xydata()
        np.testing.assert_allclose(drawn[~np.isnan(drawn[:, 1])], np.c_[t["step"], t[column] * scale])


def test_of_many_batches_the_strong_line_is_a_running_median():
    n = np.arange(1, 1001)
    t = pd.DataFrame(dict(step=n, tokens=n * 8, loss=3 - n / 1000 + (n % 100 == 0) * 5, lr=1e-5 * n, learnt=True))
    pale, strong = figures.loss(t).axes[0].lines[:2]
    assert list(pale.get_ydata()) == list(t["loss"]) and pale.get_alpha() < .5
    assert (np.abs(strong.get_ydata() - (3 - n / 1000)) < .011).all()
    assert np.array_equal(figures.loss(t).axes[1].lines[0].get_ydata(), t["lr"] * 1e4)


def known(value): return st.none() | value


@given(st.lists(st.tuples(known(st.floats(0, 1e6)), known(st.floats(0, 1e9)), known(st.booleans())), max_size=5),
       st.sampled_from(TRAINED), st.sampled_from([7.4, 3.8]))
@settings(deadline=None, max_examples=25)
def test_a_training_with_gaps_can_be_drawn(steps, draw, width):
    "From the first line on, whatever is missing: this is what the live figure meets."
    lines = [{"step": 0, "tokens": 0, "heldout/sec": 3.}]
    for n, (loss, norm, learnt) in enumerate(steps, 1):
        row = dict(step=n, tokens=8 * n, loss=loss, grad_norm=norm, learnt=learnt, mfu=norm, lr=loss, memory_bytes=norm)
        lines.append({k: v for k, v in row.items() if v is not None or n % 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.svg(draw(pd.DataFrame(lines), width=width))
    assert "nan" not in re.sub("[>][^<]*", "", drawn).lower()
    assert ("skipped" in drawn) == (draw != figures.pace and any(learnt is False for *_, learnt in steps))


def test_a_long_training_stays_a_small_picture():
    n = 50_000
    noise = np.random.default_rng(0).normal(0, .1, n)
    long = pd.DataFrame(dict(step=range(n), tokens=np.arange(n) * 4_000_000, loss=2 + noise, grad_norm=1 + noise, learnt=True,
                             lr=1e-5, tokens_per_second=3e4 + noise, mfu=.4 + noise / 9, memory_bytes=6e10))
    assert all(len(figures.svg(draw(long))) < 3e6 for draw in TRAINED)


def test_facts_put_what_is_nested_into_one_line_or_a_row_each():
    told = figures.facts(dict(parameters=7, logits_check=None, layout=dict(tp=2, sp=True), epochs={}, kept=["a", "b"], order=[], seconds={"steps": 7.25},
                              megatron={k: "megatron.core." + k * 30 for k in ("model", "data")}))
    assert told.to_dict() == {"parameters": 7, "logits check": None, "layout": "tp 2 · sp yes", "epochs": "none",
                              "kept": "a · b", "order": "none", "seconds": "steps 7.25", "megatron: model": "megatron.core." + "model" * 30,
                              "megatron: data": "megatron.core." + "data" * 30}
    assert "{" not in figures.Table(told)._repr_html_()


def test_a_cell_has_beside_what_is_read_what_a_machine_reads():
    t = pd.DataFrame(dict(task=["a;b", None], n=[81_920, 7], gain=[-.123456, np.nan], ci_low=[1.0012, np.nan], ci_high=[1.023, np.nan], chat=[True, False]))
    cells = re.findall(r"<t[dh][^>]*?(?: data-v=\"([^\"]*)\")?>([^<]*)</t[dh]>", figures.table_html(t, "t"))
    assert [said for said, _ in cells] == ["", "", "", "ci low;ci high", "", "", "81920", "-0.123456", "1.0012;1.023", "True", "", "", "", ";", "False"]
    assert [figures.exact(x) for x in (None, pd.NA, np.nan, 7, 2.5, np.bool_(True), "text", [1])] == ["", "", "", "7", "2.5", "True", None, None]


def test_a_table_without_rows_is_a_sentence():
    assert figures.Table(pd.DataFrame(), empty="Nothing <yet>.")._repr_html_() == "<p>Nothing &lt;yet&gt;.</p>"
    assert "<table" in figures.Table(pd.DataFrame(dict(x=[1])), empty="Nothing.")._repr_html_()


@pytest.mark.parametrize("given", ["a checkpoint", "a training"])
def test_the_train_notebook_shows_a_training_and_a_checkpoint_that_was_given(tmp_path, given):
    if given == "a training": made_run._train(tmp_path, np.random.default_rng(0))
    else:
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "info.json").write_text('{"checkpoint": "somebody/else"}')
    drawn = "sec,1.0,2,81920,1.0\n" * (given == "a training")
    (tmp_path / "mixture.csv").write_text("corpus,asked,documents,tokens,share\n" + drawn)
    stage = types.SimpleNamespace(folder=tmp_path, params=made_run.params())
    book = made_run.notebook(notebook_path("train"), stage)
    shown = [o["data"] for c in book.cells for o in c.get("outputs", []) if o["output_type"] == "execute_result"]
    text = " ".join(d.get("text/html") or d["image/svg+xml"] for d in shown)
    assert len(shown) == 8 and text.count("<svg") == 4
    if given == "a training": assert "81,920" in text and "tp 2 · pp 1" in text and "on 2 processes" in text
    else: assert "Nothing: no batch was skipped" in text and text.count("the table is empty") == 4 and "somebody/else" in text


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


def density(models=("cpt", "original")) -> pd.DataFrame:
    return pd.DataFrame([dict(model=m, density=d, kind=kind, bits_per_byte=1 + d / n, ci_low=0, ci_high=3, tokens=9, difference=(d - 1) / n,
                              difference_low=(d - 1) / n - .1, difference_high=(d - 1) / n + .1)
                         for kind in ("domain", "general") for n, m in enumerate(models, 2) for d in (1., .2, .5)])


def plane(step: float = .25, kinds=("domain", "general"), bits=lambda a, b, c: 1 + (c - .7) ** 2) -> pd.DataFrame:
    line = np.arange(-.25, 1.26, step)
    points = [(1., 0., 0.), (0., 1., 0.), (0., 0., 1.), *((1 - u - v, u, v) for u in line for v in line if -.26 < 1 - u - v < 1.26)]
    return pd.DataFrame([{"original": a, "cpt@20": b, "cpt": c, "kind": kind, "bits_per_byte": bits(a, b, c)}
                         for kind in kinds for a, b, c in points])


THREE = (("original", "base"), ("cpt", "base"), ("original", "cpt"))


@pytest.mark.equality
@pytest.mark.parametrize("draw, table", [(figures.geometry, made_run.geometry(THREE)), (figures.density_curve, density()),
                                         (figures.plane, plane())], ids=["geometry", "density", "plane"])
def test_the_landscape_is_drawn_the_same_and_stays_small(draw, table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page, phone = figures.svg(draw(table)), figures.svg(draw(table, width=3.8))
    assert page == figures.svg(draw(table)) != phone and "<image" not in page and len(page) < 4e5


def cells(ax) -> np.ndarray: return ax.collections[0].get_array()


def test_heatmaps_hold_the_tables_cells():
    t = made_run.geometry(THREE, layers=5)
    maps = {ax.get_title(loc="left"): ax for ax in figures.geometry(t).axes if ax.get_title(loc="left")}
    assert list(maps) == [title for title, _ in figures.MAPS.values()]
    length, weights, vectors, signs = maps.values()
    assert cells(length).shape == (8, 5) and cells(weights).shape == (12, 5) and cells(vectors).shape == (4, 5)
    second = t.query("model == 'cpt' and kind == 'mlp'").set_index("layer").relative_norm * 100
    np.testing.assert_allclose(cells(length)[6], second)                       # a name, three kinds, a name, attention, mlp
    assert cells(length)[[0, 4]].mask.all() and np.allclose(cells(vectors)[1:], .2) and np.allclose(cells(signs)[1:], 40)
    assert [x.get_text() for x in length.texts] == ["original over base", "cpt over base"]
    assert [x.get_text() for x in length.get_yticklabels()] == ["attention", "mlp", "other"] * 2


def test_one_task_vector_has_two_maps_and_models_without_layers_none():
    t = made_run.geometry()
    assert [ax.get_title(loc="left") for ax in figures.geometry(t).axes][:2] == [figures.MAPS[c][0] for c in
                                                                                ("relative_norm", "cosine_of_weights")]
    assert "the table is empty" in figures.svg(figures.geometry(t.assign(layer=np.nan)))


def test_density_curves_run_through_the_table():
    for ax, kind in zip(figures.density_curve(density()).axes, ("domain", "general")):
        assert ax.get_title(loc="left") == f"{kind} text" and len(ax.lines) == 2 and len(ax.collections) == 2
        np.testing.assert_allclose(ax.lines[0].get_xydata(), [(.2, 1.1), (.5, 1.25), (1, 1.5)])
        assert ax.collections[0].get_paths()[0].get_extents().bounds == pytest.approx((.2, 1, .8, .6))    # paired, not each for itself
        assert {x.get_text() for x in ax.texts} > {"cpt", "original"}


def test_the_plane_has_its_corners_where_the_models_are_and_a_star_at_the_lowest():
    table = plane(.125, bits=lambda a, b, c: 1 + (a - .25) ** 2 + (b - .25) ** 2 + (c - .5) ** 2)
    ax = figures.plane(table).axes[0]
    (star,) = points(ax, "*")
    np.testing.assert_allclose(star, np.array([.25, .25, .5]) @ figures.CORNERS, atol=1e-9)
    np.testing.assert_allclose(points(ax, "o"), figures.CORNERS)
    assert [x.get_text() for x in ax.texts] == ["original", "cpt@20", "cpt"] and len(points(ax, ".")) == len(table) / 2
    bars = [x.get_yticks() for x in figures.plane(table).axes[2:]]
    assert all(len(ticks) > 1 and table.bits_per_byte.min() <= ticks.min() <= ticks.max() <= table.bits_per_byte.max() for ticks in bars)
    outline = {tuple(np.round(p, 9)) for line in ax.lines if line.get_marker() == "None" for p in line.get_xydata()}
    assert outline == {tuple(np.round(p, 9)) for p in figures.CORNERS}


@pytest.mark.parametrize("bits", [lambda a, b, c: 1., lambda a, b, c: 1 + (c < 0) * 1e6, lambda a, b, c: 1 + max(0, -a) * 40,
                                  lambda a, b, c: 1 + a if min(a, b, c) >= 0 else [np.nan, np.inf][int(b < 0)]])
def test_a_flat_plane_and_a_cliff_beyond_its_edges_can_be_drawn(bits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.svg(figures.plane(plane(.75, kinds=["domain"], bits=bits), width=3.8))
    assert "nan" not in re.sub("[>][^<]*", "", drawn).lower()


@pytest.mark.parametrize("ground", ["#ffffff", "#121212"])
def test_colours_stand_out_on_both_grounds(ground):
    "WCAG asks 3 to 1 of graphics."
    for colour in [*figures.FAMILIES.values(), *figures.KINDS.values(), figures.VERDICTS["better"], figures.VERDICTS["worse"]]:
        light, dark = sorted([luminance(colour), luminance(ground)], reverse=True)
        assert (light + .05) / (dark + .05) >= 3, colour


SEEN_BY = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "protan": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    "deutan": [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    "tritan": [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}


def seen_by(eye: str, colour: str) -> np.ndarray:
    "A colour in Lab as an eye sees it."
    linear = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
    x, y, z = (np.array([[.4124, .3576, .1805], [.2126, .7152, .0722],
                         [.0193, .1192, .9505]]) @ np.clip(np.array(SEEN_BY[eye]) @ linear, 0, 1)) / [.9505, 1, 1.089]
    f = np.cbrt([x, y, z])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", SEEN_BY)
def test_families_differ_for_colour_blind_eyes(eye):
    "Original, base, CPT and merge stay apart in Lab; the two CPT tones differ by open and filled marks."
    tones = [seen_by(eye, figures.FAMILIES[f]) for f in ("original", "base", "cpt", "merge:")]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(tones) for b in tones[i + 1:]) > 15


@pytest.mark.parametrize("eye", SEEN_BY)
def test_verdicts_are_told_apart_and_have_the_colours_of_the_tiles(eye):
    better, worse, unsure = (seen_by(eye, c) for c in figures.VERDICTS.values())
    assert min(np.linalg.norm(a - b) for a, b in ((better, worse), (better, unsure), (worse, unsure))) > 15
    for word in ("better", "worse"): assert f".tiles > .{word} {{ border-left-color: {figures.VERDICTS[word]}; }}" in site.LAYOUT
    assert figures.VERDICTS["better"] not in [*figures.FAMILIES.values(), *figures.KINDS.values()]


FUNNEL = pd.DataFrame([dict(corpus=c, step=s, documents=3, characters=n) for c in ("sec", "wiki", "odd") for s, n in (("read", 9), ("kept", 6))])
LENGTHS = pd.DataFrame([dict(corpus=c, from_characters=2 ** n, documents=n) for c in ("sec", "wiki", "odd") for n in (9, 10)])
MIXTURE = pd.DataFrame([dict(corpus=c, asked=.3, documents=2, tokens=9, share=.3) for c in ("sec", "wiki", "odd")])


@pytest.mark.parametrize("draw, table", [(figures.funnel, FUNNEL), (figures.lengths, LENGTHS), (figures.mixture, MIXTURE)])
def test_a_corpus_has_the_colour_of_its_kind(draw, table):
    inks = [figures.KINDS["domain"], figures.KINDS["general"], figures.FAMILIES["original"]]
    axes = draw(table, kinds=dict(sec="domain", wiki="general")).axes
    if draw is figures.mixture: assert [line.get_markeredgecolor() for line in axes[0].lines] == [c for c in inks for _ in range(2)]
    else: assert [{matplotlib.colors.to_hex(p.get_facecolor()) for p in ax.patches} for ax in axes[:3]] == [{c} for c in inks]
    assert not any(c in figures.svg(draw(table)) for c in inks[:2])


def test_text_of_a_table_cannot_become_markup():
    for x in (made_run.NASTY, "</td><td>"):
        page = figures.table_html(pd.DataFrame({x: [x]}), x)
        assert "<script" not in page and "<img" not in page and page.count("<td") == 1


@pytest.mark.parametrize("draw", [figures.funnel, *TRAINED, figures.mixture,
                                  lambda t: figures.perplexity(t, "domain"), figures.benchmarks,
                                  figures.tradeoff, figures.sweep, figures.geometry, figures.density_curve, figures.plane])
def test_an_empty_table_says_that_it_is_empty(draw):
    assert "the table is empty" in figures.svg(draw(pd.DataFrame()))


@pytest.mark.parametrize("draw, table", [
    (lambda t: figures.perplexity(t, "general"), PERPLEXITY.query("kind == 'domain'")),
    (figures.checkpoints, PERPLEXITY.assign(tokens_seen=np.nan)),
    (figures.sweep, pd.DataFrame(dict(name=["original"], domain_bits_per_byte=1., general_bits_per_byte=np.nan, on_front=False))),
    (figures.runs_tradeoff, tradeoff(0, 0).query("variant == 'original'").assign(run="a")),
    (figures.plane, made_run.plane().assign(bits_per_byte=np.nan))],
    ids=["perplexity", "checkpoints", "sweep", "runs_tradeoff", "plane"])
def test_a_table_without_rows_to_draw_says_that_it_is_empty(draw, table):
    "As of a run without general text, or with a checkpoint of which nobody knows what it has seen."
    assert "the table is empty" in figures.svg(draw(table))


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.svg(figures.tradeoff(tradeoff(2, 0)))
    assert dict(matplotlib.rcParams) == before


def test_importing_figures_is_light():
    code = "import sys, domain_adapt.figures, domain_adapt.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "sphinx", "seaborn"} & set(done.stdout.split())


SHARES = made_run.weights()


@pytest.mark.parametrize("width", [7.4, 3.8])
def test_every_share_is_drawn_where_the_table_says(width):
    ax = figures.effective_weights(SHARES, width=width).axes[0]
    drawn = [m.get_array().compressed().tolist() for m in ax.collections]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["cpt attention", "cpt mlp", "cpt other", "original attention", "original mlp", "original other", "base", "cpt", "original"]
    by_depth = SHARES.query("name == 'listing-1' and model == 'cpt'").set_index(["kind", "layer"])["weight"]
    for kind in ("attention", "mlp", "other"): assert by_depth[kind].dropna()[[0, 1, 2, 3]].tolist() in drawn
    assert [0.7] in drawn and [0.25] in drawn                     # one cell for what is the same everywhere; the head's own
    assert "dare" in [t.get_text().split(",")[0] for t in ax.texts] and not any("dare@8" in t.get_text() for t in ax.texts)


def test_shares_that_are_found_while_merging_are_said_so():
    unknown = SHARES.query("name == 'dare'").assign(weight=np.nan)
    said = [t.get_text() for t in figures.effective_weights(unknown).axes[0].texts]
    assert said.count("found while merging") == 2
    assert figures.svg(figures.effective_weights(SHARES)) == figures.svg(figures.effective_weights(SHARES))
