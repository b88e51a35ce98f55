"Items found in training text: against ingest's own filter, against a plain search, and what it takes of time and memory."
import gzip
import json
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datatrove.data import Document
from hypothesis import example, given, settings
from hypothesis import strategies as st

from domain_adapt.contamination import COLUMNS, contamination, run_hashes, scores_without, training_texts
from domain_adapt.repeats import Decontaminate, write_index

FOURTEEN = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"
WORDS = st.lists(st.sampled_from(["a", "A,", "a.", "\na", "7"]), min_size=10, max_size=30).map(" ".join)    # so alike that runs often meet


def answers(values: dict[str, list[float]], task: str = "t") -> pd.DataFrame:
    return pd.DataFrame([dict(variant=v, task=task, metric="acc", item=str(i), value=x) for v, xs in values.items() for i, x in enumerate(xs)])


@pytest.mark.parametrize("document, hit", [
    (FOURTEEN, True), ("before " + FOURTEEN + " after", True),
    (" ".join(FOURTEEN.split()[:13]), True), (" ".join(FOURTEEN.split()[1:]), True),
    (" ".join(FOURTEEN.split()[:12]), False), (" ".join(FOURTEEN.split()[:11] + ["nu", "mu", "xi"]), False),
    (FOURTEEN.upper().replace(" ", ",\n\t "), True), (FOURTEEN.replace("eta", "etas"), False), ("", False)])
def test_thirteen_words_in_a_row_are_a_hit(document, hit):
    assert contamination([("t", "0", FOURTEEN)], [document])["hit"].tolist() == [hit]


def test_numbers_count():
    said = FOURTEEN.replace("eta theta", "1,250 in 2019")
    assert not contamination([("t", "0", said)], [said.replace("2019", "2020")])["hit"].any()
    assert contamination([("t", "0", said)], [said])["hit"].all()


def test_a_run_lies_in_one_string_and_in_one_document():
    a, b = FOURTEEN.split()[:7], FOURTEEN.split()[7:]
    parts = [("t", "0", " ".join(a)), ("t", "0", " ".join(b))]
    assert contamination(parts, [FOURTEEN])[["hit", "short"]].values.tolist() == [[False, True]]
    assert not contamination([("t", "0", FOURTEEN)], [" ".join(a), " ".join(b)])["hit"].any()


def test_items_keep_their_order_and_those_of_the_same_name_in_two_tasks_apart():
    items = [("b", "0", "short"), ("a", "0", FOURTEEN), ("b", "0", "another string"), ("a", "1", FOURTEEN[::-1])]
    found = contamination(iter(items), iter([FOURTEEN]))
    assert found.values.tolist() == [["b", "0", False, True], ["a", "0", True, False], ["a", "1", False, False]]
    assert list(contamination([], [FOURTEEN])) == ["task", "item", "hit", "short"]


@pytest.mark.oracle
@settings(max_examples=40, deadline=None)
@given(WORDS, WORDS)
@example(FOURTEEN, "The " + FOURTEEN.title())
def test_ingest_drops_exactly_the_documents_that_hit(tmp_path_factory, item, document):
    folder = tmp_path_factory.mktemp("index")
    write_index([("t", item)], folder)
    kept = Decontaminate(folder).filter(Document(text=document, id="0"))
    assert contamination([("t", "0", item)], [document])["hit"].tolist() == [kept is not True]


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=5))
def test_hits_are_those_of_a_plain_search(texts, documents):
    def runs(text):
        words = ["".join(c for c in w.lower() if c.isalnum()) for w in text.split()]
        return {tuple(words[i:i + 13]) for i in range(len(words) - 12)}
    read = set().union(*map(runs, documents))
    found = contamination([("t", str(i), x) for i, x in enumerate(texts)], documents)
    assert found["hit"].tolist() == [bool(runs(x) & read) for x in texts] and found["short"].tolist() == [not runs(x) for x in texts]


def test_memory_is_the_items_whatever_is_read():
    g = np.random.default_rng(0)
    text = lambda n: " ".join(map(str, g.integers(0, 10**6, n)))
    items = [("t", str(i), text(40)) for i in range(50)]
    def most(documents):
        tracemalloc.start()
        contamination(items, (text(2000) for _ in range(documents)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    assert most(40) < 1.2 * most(4)


@pytest.mark.fault
@pytest.mark.parametrize("text", ["a " * 1_000_000, "a" * 5_000_000, "\x00\ufffd\u202e" * 500_000, "… — " * 500_000])
def test_hostile_text_does_not_hang(text):
    start = time.process_time()
    run_hashes(text)
    assert time.process_time() - start < 40


def test_only_what_is_trained_on_is_read(tmp_path):
    (tmp_path / "sec").mkdir(), (tmp_path / "news").mkdir()
    def write(corpus, **texts):
        with gzip.open(tmp_path / corpus / "00000.jsonl.gz", "wt") as f:
            f.writelines(json.dumps(dict(id=i, text=t, metadata=dict(source_path=f"{i}.txt"))) + "\n" for i, t in texts.items())
    write("sec", one="is read", two="is held out"), write("news", three="is held out", four="is news")
    corpora = dict(sec=SimpleNamespace(heldout=["two*"]), news=SimpleNamespace(heldout=0.0))
    assert list(training_texts(SimpleNamespace(corpora=corpora, seed=7), tmp_path)) == ["is read", "is news"]


def test_scores_without_what_was_read():
    found = contamination([("t", "0", FOURTEEN), ("t", "1", FOURTEEN[::-1]), ("t", "2", "short")], [FOURTEEN])
    table = scores_without(found, answers({"original": [0, 1, 0], "cpt": [1, 1, 0]}))
    assert list(table) == COLUMNS and table["variant"].tolist() == ["original", "cpt"]
    assert table[["items", "short", "hit", "share"]].values.tolist() == [[3, 1, 1, 0.5]] * 2
    assert table["value"].tolist() == pytest.approx([1 / 3, 2 / 3]) and table["value_without"].tolist() == [0.5, 0.5]    # its lead is gone


def test_what_cannot_be_said_is_empty():
    table = scores_without(contamination([("t", "0", FOURTEEN), ("u", "0", "short")], [FOURTEEN]),
                           pd.concat([answers({"cpt": [1]}), answers({"cpt": [1]}, "u")]))
    assert np.isnan(table["value_without"][0]) and table["share"][0] == 1      # nothing is left to score
    assert np.isnan(table["share"][1]) and table["value_without"][1] == 1      # nothing could be looked for


def test_an_item_nobody_looked_for_is_an_error():
    with pytest.raises(ValueError, match=r"not looked for in the training text: \['1'\]"):
        scores_without(contamination([("t", "0", FOURTEEN)], []), answers({"cpt": [1, 1]}))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_the_two_parts_add_up_to_the_whole(rows):
    found = pd.DataFrame([dict(task="t", item=str(i), hit=h, short=False) for i, (h, _) in enumerate(rows)])
    r = scores_without(found, answers({"cpt": [float(x) for _, x in rows]})).iloc[0]
    with_hits = sum(x for h, x in rows if h)
    clean = 0 if r.hit == r["items"] else r.value_without * (r["items"] - r.hit)
    assert r.value * r["items"] == pytest.approx(with_hits + clean)


def test_real_items_are_found_in_real_text(dev_data):
    general = (dev_data / "general" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:300_000]
    lines = [x for x in general.split("\n") if len(x.split()) > 60][:40]
    planted = general.replace("\n", " ")
    items = [("wiki", str(i), x) for i, x in enumerate(lines)] + [("made", "0", FOURTEEN)]
    found = contamination(items, [planted])
    assert found["hit"].tolist() == [True] * 40 + [False]
