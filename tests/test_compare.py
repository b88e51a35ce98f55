"""Runs on one page: what differs, and differences that are paired only where the same blocks were read."""
import shutil

import lxml.html
import numpy as np
import pandas as pd
import pytest
import yaml

import made_run
from domain_adapt.compare import compare, finished, pairs_table, settings_table
from domain_adapt.params import UserError
from domain_adapt.report import build_report
from domain_adapt.runs import write_text


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two finished made-up runs that differ in one setting and in one corpus of their blocks."
    outputs = tmp_path_factory.mktemp("outputs")
    params, folders = made_run.make(outputs / "first")
    for name, replay in (("first", .05), ("second", .1)):
        if name == "second": shutil.copytree(outputs / "first", outputs / "second", symlinks=True)
        given = yaml.safe_load(yaml.safe_dump(params.model_dump(mode="json"))) | {"run": name}
        given["tokens"]["replay"] = replay
        write_text(outputs / name / "params.yaml", yaml.safe_dump(given))
    blocks = outputs / "second" / "5_evaluate" / "blocks.csv"
    t = pd.read_csv(blocks)
    t.loc[t["variant"] == "cpt", "nll"] *= .99
    t.loc[t["corpus"] == "news", "bytes"] += 1
    t.to_csv(blocks, index=False)
    from domain_adapt.params import load_params
    for name in ("first", "second"):
        home = outputs / name
        build_report(load_params(home / "params.yaml"), {k: home / v.relative_to(outputs / "first") if v != outputs / "first" else home for k, v in folders.items()},
                     home / "6_report")
    return outputs


@pytest.fixture
def outputs(two, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(two))
    return two


def test_only_what_differs_is_shown(outputs):
    table = settings_table({n: finished(n)[0] for n in ("first", "second")})
    assert table.to_numpy().tolist() == [["tokens.replay", "0.05", "0.1"]]


def test_pairs_are_of_the_corpora_that_both_read(outputs):
    table, same = pairs_table({n: finished(n) for n in ("first", "second")})
    assert set(same) == {"sec", "wiki"}
    cpt = table.query("variant == 'cpt'").set_index("kind")
    first = finished("first")[2]["domain_bits_per_byte"]["cpt"]["value"]
    assert cpt.loc["domain", "difference"] == pytest.approx(-.01 * first) and (cpt["verdict"] == "better").all()
    chosen = table.query("variant == 'chosen merge'")
    assert np.allclose(chosen["difference"], 0) and (chosen["verdict"] == "cannot tell").all()


def test_the_page_has_every_variant_and_asks_nobody(outputs):
    page = compare(["first", "second"])
    root = lxml.html.parse(page).getroot()
    text = root.text_content()
    assert page == outputs / "compare" / "first_second" / "index.html" and "tokens.replay" in text and "sec, wiki" in text
    saved = pd.read_csv(page.parent / "tables" / "variants.csv")
    assert saved.groupby("run").size().to_dict() == {n: len(made_run.EVALUATED) for n in ("first", "second")}
    assert not [link for _, _, link, _ in root.iterlinks() if link.startswith(("http", "//"))]
    assert str(outputs) not in page.read_text()


def test_a_run_that_is_not_there_is_named(outputs):
    with pytest.raises(UserError, match="nowhere: no finished run"): compare(["first", "nowhere"])
    with pytest.raises(UserError, match="two different runs"): compare(["first", "first"])


def test_runs_of_one_name_are_not_taken_for_one(outputs, tmp_path):
    (tmp_path / "first").symlink_to(outputs / "second")
    for second in (outputs / "first", tmp_path / "first"):
        with pytest.raises(UserError, match=r"are both called first"): compare(["first", str(second)])
