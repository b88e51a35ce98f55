"""The report: true to its tables, safe to open, the same again."""
import hashlib
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import lxml.html
import numpy as np
import pandas as pd
import pytest

import made_run
from domain_adapt import provenance, report
from domain_adapt.report import build_report
from domain_adapt.runs import write_csv, write_json, write_text
from domain_adapt.summary import abstract, headline, interval, told


@pytest.fixture(scope="module")
def site() -> Path:
    return made_run.site()


@pytest.fixture(scope="module")
def summary(site) -> dict:
    return json.loads((site.parent / "summary.json").read_text())


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_there_is_a_page_for_each_stage(site):
    assert {"index.html", "results.html", "claims.html", "1_ingest.html", "2_tokens.html", "3_train.html", "4_merge.html",
            "5_evaluate.html", "lineage.html", "cost.html"} <= {p.name for p in pages(site)}
    assert {p.stem for p in (site / "library").glob("[0-9]*.html")} == {p.stem for p in (made_run.ROOT / "nbs").glob("[0-9]*.ipynb")}


def test_it_is_small(site):
    assert sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) < 10e6


@pytest.mark.oracle
def test_headline_numbers_are_those_of_the_blocks(site, summary):
    blocks = pd.read_csv(site / "tables" / "blocks.csv").query("half == 'report'")
    sums = blocks.groupby(["corpus", "variant"])[["nll", "bytes"]].sum()
    bits = (sums["nll"] / sums["bytes"] / np.log(2)).unstack()
    assert set(summary["gain_percent"]) == set(made_run.EVALUATED)
    for v in made_run.EVALUATED:
        assert summary["domain_bits_per_byte"][v]["value"] == pytest.approx(bits.loc["sec", v])
        gain = (1 - bits.loc["sec", v] / bits.loc["sec", "original"]) * 100
        assert summary["gain_percent"][v]["value"] == pytest.approx(gain)
        change = [(bits.loc[c, v] / bits.loc[c, "original"] - 1) * 100 for c in ("wiki", "news")]
        assert summary["general_change_percent"][v]["value"] == pytest.approx(np.mean(change))
        lost = [max(0, bits.loc[c, v] - bits.loc[c, "original"]) for c in ("wiki", "news")]
        assert summary["forgetting"][v]["mean"]["value"] == pytest.approx(np.mean(lost))
    w = summary["winner"]
    assert w == "merge:linear-0.7"
    sec = bits.loc["sec"]
    kept = (sec["original"] - sec[w]) / (sec["original"] - sec["cpt"])
    assert summary["retention"][w]["value"] == pytest.approx(kept)


def test_intervals_hold_their_values_and_paired_ones_are_narrow(summary):
    for v in made_run.EVALUATED[1:]:
        own, gain = summary["domain_bits_per_byte"][v], summary["gain_percent"][v]
        assert own["low"] < own["value"] < own["high"] and gain["low"] < gain["value"] < gain["high"]
        assert gain["high"] - gain["low"] < (own["high"] - own["low"]) / own["value"] * 100 / 3


def test_the_summary_keeps_the_contract(summary):
    assert (summary["tokens_trained"], summary["steps"], summary["skipped"]) == (81920, 40, 2)
    assert summary["checkpoint"] is None and summary["mixture"]["wiki"] == dict(kind="general", tokens=4096, share=.05)
    assert summary["precision"] == {"train": "bf16", "evaluate": "bf16"}
    assert summary["heldout"]["sec"]["intervals"] == "within one document"
    assert summary["heldout"]["news"]["documents"] == 30
    score = summary["benchmarks"]["cpt"]["hellaswag"]
    assert score["n"] == 100 and score["low"] < score["value"] < score["high"]
    assert "numpy" in summary["versions"] and summary["rule"] and "ties" in summary["notes"]


def test_the_training_is_told_as_it_was(summary):
    drawn = dict(filings=dict(kind="domain", tokens=900, share=.9), wiki=dict(kind="general", tokens=70, share=.07),
                 code=dict(kind="general", tokens=30, share=.03))
    first = abstract(summary | dict(mixture=drawn), None)[0]
    assert "was trained for 40 more steps (2 more were skipped) on 81.9 k tokens of filings, with 10\N{NO-BREAK SPACE}% general text replayed." in first


def test_the_items_of_a_group_are_not_those_of_a_task(summary):
    group = dict(metric="mean", value=.5, low=.4, high=.6, n=800)
    grown = summary | dict(benchmarks={v: by | dict(mmlu=group) for v, by in summary["benchmarks"].items()})
    compared = pd.DataFrame([dict(measure="piqa/acc_norm", against="original", verdict="better")])
    assert "at up to 100 items each, 1 came out better" in abstract(grown, compared)[1]
    assert report.facts({}, grown)["items"] == "100"


@pytest.mark.parametrize("gain, said", [
    (dict(value=5., low=-1., high=9.), "went from 1.000 to 0.950, a gain of 5.0\N{NO-BREAK SPACE}% [\N{MINUS SIGN}1.0,\N{NO-BREAK SPACE}9.0], "
                                       "which this sample cannot tell from no change."),
    (dict(value=5., low=1., high=9.), "fell from 1.000 to 0.950, a gain of 5.0\N{NO-BREAK SPACE}% [1.0,\N{NO-BREAK SPACE}9.0]."),
    (None, "are undefined, so no gain can be given.")], ids=["unsure", "sure", "undefined"])
def test_a_verb_is_what_the_interval_allows(summary, gain, said):
    bits = dict(original=dict(value=1.), cpt=dict(value=.95) if gain else None)
    assert f"its bits per byte {said}" in abstract(summary | dict(gain_percent=dict(cpt=gain), domain_bits_per_byte=bits), None)[0]


@pytest.mark.parametrize("change, wiki, said", [
    ((-2, -3, -1), (-.06, -.05), "General text was not forgotten"),
    ((-2, -3, -1), (.02, .04), "Of general text, wiki was forgotten to some degree, which the mean hides"),
    ((0, -1, 1), (.02, .04), "Of general text, wiki was forgotten to some degree, which the mean hides"),
    ((2, 1, 3), (.02, .04), "General text was forgotten to some degree"),
    (None, (None, None), "On held-out general text its bits per byte are undefined")])
def test_no_corpus_hides_behind_the_mean(summary, change, wiki, said):
    change = change and dict(zip(("value", "low", "high"), change))
    lost = dict(wiki=dict(value=0, low=wiki[0], high=wiki[1]), news=dict(value=-.1, low=-.2, high=-.05), mean=None)
    assert said in abstract(summary | dict(general_change_percent=dict(cpt=change), forgetting=dict(cpt=lost), winner=None), None)[0]


def test_a_ratio_with_no_meaning_is_not_given(summary):
    assert summary["recovery"]["original"]["value"] == pytest.approx(1)
    flat = np.linspace(-1, 1, 101)
    assert told(interval(flat)) == "cannot tell" and interval(np.full(5, np.nan)) is None


def test_the_table_for_the_terminal_has_every_variant(summary):
    table = headline(summary)
    assert [v.removesuffix(" ★")
            for v in table["variant"]] == made_run.EVALUATED and table["variant"].str.endswith("★").sum() == 1
    assert set(table["domain"]) <= {"better", "worse", "cannot tell",
                                    "–"} and table.loc[2, "domain"] == "better"


def test_sentences_and_tables_hold_the_summary_numbers(site, summary):
    text = lxml.html.parse(site / "index.html").getroot().text_content()
    for v in ("cpt", summary["winner"]): assert f"{summary['gain_percent'][v]['value']:.1f}" in text
    assert f"{summary['domain_bits_per_byte']['original']['value']:.3f}" in text
    assert text.count("Figure ") >= 2 and "domain-adapt run outputs/made/params.yaml" in text
    results = lxml.html.parse(site / "results.html").getroot().text_content()
    assert "divides the weight out" in results and results.count("Figure ") >= 9


def test_tables_beside_the_page_are_the_saved_ones(site):
    run = site.parent
    for name, stage in {"funnel": "1_ingest", "sweep": "4_merge", "perplexity": "5_evaluate",
                        "benchmarks": "5_evaluate", "comparisons": "5_evaluate"}.items():
        pd.testing.assert_frame_equal(pd.read_csv(site / "tables" / f"{name}.csv"),
                                      pd.read_csv(run / stage / f"{name}.csv"))


def test_no_page_asks_a_host_for_anything(site):
    for page in pages(site):
        root = lxml.html.parse(page).getroot()
        for element, attribute, link, _ in root.iterlinks():
            assert not re.match(r"(https?:)?//", link) or element.tag == "a", (page.name, element.tag, link)
        assert "mathjax" not in page.read_text().lower() and "cdn." not in page.read_text()


def test_every_link_leads_somewhere(site):
    for page in pages(site):
        root = lxml.html.parse(page).getroot()
        for _, _, link, _ in root.iterlinks():
            url = urlparse(link)
            if url.scheme or not url.path: continue
            assert (page.parent / unquote(url.path)).exists(), (page.name, link)


def test_paths_of_this_machine_stay_here(site):
    own = [str(Path.home()), str(made_run.ROOT), made_run.SECRET, "secret-place", str(site.parent)]
    for f in site.rglob("*"):
        if f.suffix in (".html", ".json", ".csv"):
            text = f.read_text()
            assert not [p for p in own if p in text], f.name


def test_text_from_documents_and_models_is_text(site):
    for page in pages(site):
        root = lxml.html.parse(page).getroot()
        assert not root.xpath("//img[@onerror] | //script[contains(text(), 'owned')]"), page.name
    assert "<script>document.title='owned'" in lxml.html.parse(site / "4_merge.html").getroot().text_content()


def test_stage_pages_fold_code_and_drop_logs(site):
    page = (site / "1_ingest.html").read_text()
    assert "seed = None" not in re.sub("<[^>]+>", "", page) and "a warning nobody needs" not in page
    root = lxml.html.fromstring(page)
    assert "injected" in page and len(root.xpath("//details")) >= 4
    assert root.xpath("//figure//*[local-name()='svg']")


@pytest.mark.equality
def test_the_same_tables_give_the_same_site(site, tmp_path):
    params, folders = made_run.make(tmp_path)
    build_report(params, folders, tmp_path / "6_report")
    for f in site.rglob("*"):
        again = tmp_path / "6_report" / f.relative_to(site)
        assert f.is_dir() or f.read_bytes() == again.read_bytes(), f.name


def test_a_run_with_less_in_it_still_has_a_report(tmp_path):
    "Somebody else's checkpoint, no benchmarks, no executed notebooks, and a title that looks like markup."
    params, folders = made_run.make(tmp_path, title=made_run.NASTY)
    params = params.model_copy(update=dict(train=params.train.model_copy(update=dict(checkpoint="somebody/else"))))
    shutil.rmtree(folders["notebooks"])
    for f in (folders["train"] / "metrics.jsonl", folders["train"] / "mixture.csv", folders["evaluate"] / "benchmarks.csv",
              folders["evaluate"] / "comparisons.csv"):
        f.write_text("".join(f.read_text().splitlines(True)[:f.suffix == ".csv"]))
    build_report(params, folders, tmp_path / "6_report")
    root = lxml.html.parse(tmp_path / "6_report" / "index.html").getroot()
    text = root.text_content()
    assert "The CPT model was given: somebody/else, made elsewhere." in text and params.model not in text
    assert root.xpath("//h1")[0].text_content().startswith("‹script›document.title='owned'")
    assert not root.xpath("//img[@onerror] | //h1//script | //h1//em | //h1//code")


def sources(monkeypatch, params, folders, out: Path) -> dict[str, str]:
    "What a report's pages are made from, without the time that Sphinx takes."
    built = {}
    monkeypatch.setattr(report, "build_site", lambda title, pages, extra, out: built.update(pages))    # what it makes of them, the tests above look at
    build_report(params, folders, out)
    return built


def test_a_run_without_general_text_of_which_no_merge_was_kept_still_has_a_report(tmp_path, monkeypatch):
    params, folders = made_run.make(tmp_path, kinds={"sec": "domain"})
    chosen = folders["merge"] / "selection.json"
    write_json(chosen, json.loads(chosen.read_text()) | dict(winner=None, kept=[], order=[]))
    for file in folders["evaluate"].glob("*.csv"):
        write_csv(file, pd.read_csv(file).query("not variant.str.startswith('merge:')"))
    pages = sources(monkeypatch, params, folders, tmp_path / "6_report")
    assert "No general text was held out, so forgetting was not measured." in pages["index.md"]
    assert "general change" not in pages["index.md"].partition("## ")[0] and "General perplexity" not in pages["results.md"]
    assert pages["5_evaluate.ipynb"].count("the table is empty") == 1 and "the table is empty" in pages["4_merge.ipynb"]


def test_a_path_that_is_not_ascii_stays_here_too(tmp_path, monkeypatch):
    params, folders = made_run.make(tmp_path, books=False)
    params = params.model_copy(update=dict(model="/daheim/Grün/smollm"))
    sources(monkeypatch, params, folders, tmp_path / "6_report")
    assert json.loads((tmp_path / "summary.json").read_text())["model"] == "smollm"


def test_every_page_is_in_the_contents(site):
    root = lxml.html.parse(site / "index.html").getroot()
    linked = {unquote(a.get("href").partition("#")[0]) for a in root.xpath("//nav//a[@href]")}
    here = {str(p.relative_to(site)) for p in pages(site)} - {"index.html", "search.html"}
    assert here <= linked | {"index.html"}, here - linked


def cells(page: Path, label: str) -> list[list[str]]:
    "The rows of a page's table with this label."
    table, = lxml.html.parse(page).getroot().xpath(f"//div[@aria-label='{label}']//tbody")
    return [[td.text_content().strip() for td in tr] for tr in table]


def test_the_claims_page_has_what_its_table_has(site):
    saved = pd.read_csv(site / "tables" / "claims.csv")
    shown = cells(site / "claims.html", "Claims")
    assert [(r[0], r[1]) for r in shown] == list(zip(saved["claim"], saved["verdict"])) and len(saved) >= 15
    front = lxml.html.parse(site / "index.html").getroot().text_content()
    for word, verdict in (("hold", "holds"), ("fail", "fails")): assert f"{(saved['verdict'] == verdict).sum()} {word}" in front


def test_the_lineage_is_that_of_the_files(site):
    run, saved = site.parent, pd.read_csv(site / "tables" / "files.csv")
    for r in saved.itertuples():
        n = {"ingest": 1, "tokens": 2, "train": 3, "merge": 4, "evaluate": 5}[r.stage]
        assert hashlib.sha256((run / f"{n}_{r.stage}" / r.file).read_bytes()).hexdigest() == r.sha256
    for stage, rows in saved.groupby("stage"):
        whole = hashlib.sha256("".join(f"{r.sha256}  {r.file}\n" for r in rows.sort_values("file").itertuples()).encode()).hexdigest()
        assert pd.read_csv(site / "tables" / "stages.csv").set_index("stage").loc[stage, "sha256"] == whole


@pytest.mark.parametrize("checkpoint", [None, "somebody/else"])
def test_only_what_this_run_trained_is_called_trained(tmp_path, checkpoint):
    train, merge = tmp_path / "train", tmp_path / "merge"
    write_json(train / "info.json", dict(checkpoint=checkpoint) if checkpoint else {})
    file = lambda digit: dict(bytes=9, sha256=digit * 64)
    done = dict(train=dict(files={"hf/step_8/model.safetensors": file("b")}), merge=dict(files={"half/model.safetensors": file("d")}))
    bare = provenance.model_table(dict(train=train, merge=merge), done).set_index("model")["how"].to_dict()
    how = "given" if checkpoint else "trained"
    assert bare == {"original": "given", "cpt@8": how}
    write_text(merge / "half" / "mergekit_config.yml", "merge_method: linear\n")
    write_text(merge / "half" / "README.md", "".join(f"| weights of {m} | {c * 64} |\n" for m, c in (("original", "a"), ("cpt", "b"), ("chat", "c"))))
    whole = provenance.model_table(dict(train=train, merge=merge), done).set_index("model")
    assert whole["how"].to_dict() == {"original": "given", "chat": "given", "cpt": how, "cpt@8": how, "merge:half": "linear"}
    assert whole.loc["original", "sha256"] == "a" * 64 and whole.loc["cpt@8", "made_of"] == ("" if checkpoint else "original")


@pytest.mark.parametrize("size, said", [(2 ** 37, "left 128 GiB"), (3 * 2 ** 28, "left 0.75 GiB")])
def test_large_disks_are_told_in_plain_digits(size, said):
    files = {"a": dict(bytes=size, sha256="a" * 64)}
    done = dict(ingest=dict(key="k", started="2026-01-01T00:00:00Z", seconds=60., files=files))
    nothing = pd.DataFrame()
    assert said in report.cost_page(dict(stages=provenance.stage_table(done), pace=nothing, machines=nothing))


def test_the_digits_behind_a_figure_are_all_there(site):
    saved = pd.read_csv(site / "tables" / "perplexity.csv")
    root = lxml.html.parse(site / "5_evaluate.html").getroot()
    exact = {float(td.get("data-v")) for td in root.xpath("//td[number(@data-v) = number(@data-v)]")}
    assert set(saved["bits_per_byte"]) <= exact


def test_figures_have_a_text_for_who_cannot_see_them(site):
    for page in pages(site):
        for drawn in lxml.html.parse(page).getroot().xpath("//figure//*[local-name()='svg']"):
            assert len(drawn.get("aria-label")) > 15, page.name
