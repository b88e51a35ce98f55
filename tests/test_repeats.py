"""Copies and benchmarks' sentences: figures decide, the first is kept, every one is named."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt.filters import Words
from domain_adapt.repeats import (NORM, Decontaminate, Fingerprints, _first, find_copies, fingerprint,
                                  write_index)

MINHASH = MinhashDedupSignature("memory://x", MinhashConfig(norm_config=NORM), language=Words())
VOCABULARY = [a + b for a in "ba ke lo mu ni po ra si tu ve".split() for b in "dar fen gol hip jut".split()]


def text(seed: int, words: int = 400) -> str:
    r = random.Random(seed)
    return " ".join(r.choice(VOCABULARY) if r.random() > .1 else f"{r.randint(1, 9999):,}" for _ in range(words))


def copies(folder: Path, *shards: list[str]) -> dict[str, str]:
    "Reasons by id of the copies among texts, one rank a shard; ids are rank/place."
    for rank, texts in enumerate(shards):
        docs = (Document(text=t, id=f"{rank}/{n}") for n, t in enumerate(texts))
        list(Fingerprints(folder).run(docs, rank, len(shards)))
    find_copies(folder, len(shards))
    return {f"{rank}/{n}": why for rank in range(len(shards))
            for n, why in json.loads((folder / f"{rank:05d}.copies").read_text()).items()}


def test_the_first_of_copies_is_kept_across_shards(tmp_path):
    a, b = text(1), text(2)
    spaced = a.replace(" ", "\n ")
    edited = " ".join("changed" if n % 97 == 50 and not w[0].isdigit() else w for n, w in enumerate(b.split()))
    found = copies(tmp_path, [a, b], [spaced, text(3)], [], [edited])
    assert found == {"1/0": "same as 0/0", "3/0": "nearly the same as 0/1"}


@pytest.mark.parametrize("figure", ["1,234", "0.5", "2025"])
def test_reports_that_differ_in_one_figure_both_stay(tmp_path, figure):
    report = text(5, 4000)
    assert copies(tmp_path, [f"{report} {figure} end", f"{report} {figure[:-1]}9 end", f"{report} {figure} end"]) == {
        "0/2": "same as 0/0"}


def test_all_figures_anew_is_another_report(tmp_path):
    words, r = text(6, 4000), random.Random(0)
    other = " ".join(f"{r.randint(1, 9999):,}" if w[0].isdigit() else w for w in words.split())
    assert copies(tmp_path, [words], [other]) == {}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=40))
def test_the_first_of_each_group(rows):
    "Against a plain union of everything that shares a value in a column."
    group = list(range(len(rows)))
    for _ in rows:
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if any(x == y for x, y in zip(a, b)): group[i] = group[j] = min(group[i], group[j])
    assert _first(np.array(rows, np.uint64)).tolist() == group


@pytest.mark.parity
def test_near_copies_are_found_as_often_as_minhash_says():
    "Texts that share 4 of 5 runs of words meet in a band with probability 1 - (1 - s^8)^14."
    met, similar = 0, []
    for seed in range(60):
        words = [w for w in text(seed, 500).split() if not w[0].isdigit()]
        other = [w if random.Random(f"{seed}{n}").random() > .02 else "else" for n, w in enumerate(words)]
        a, b = (set(zip(*(x[i:] for i in range(5)))) for x in (words, other))
        similar.append(len(a & b) / len(a | b))
        one, two = (fingerprint(MINHASH, " ".join(x)) for x in (words, other))
        met += any(x == y for x, y in zip(one[1:], two[1:]))
    expected = sum(1 - (1 - s ** 8) ** 14 for s in similar)
    assert abs(met - expected) < 10, (met, expected)


def test_short_texts_are_only_the_same_when_they_are(tmp_path):
    assert copies(tmp_path, ["Too few", "too few", "Too few"]) == {"0/2": "same as 0/0"}


ITEM = "Question: a red fox runs over the long wooden bridge at night because it is hungry, what does it want?"


@pytest.mark.parametrize("said, dropped", [
    (ITEM, True), (f"Once {ITEM.upper()} and more", True), ("x " + " ".join(ITEM.split()[3:16]) + " y", True),
    ("x " + " ".join(ITEM.split()[3:15]) + " y", False), (ITEM.replace("long", "short").replace("night", "noon"), False)])
def test_thirteen_words_of_an_item_are_found(tmp_path, said, dropped):
    assert write_index([("fox", ITEM), ("other", "of no account"), ("fox", text(9, 12))], tmp_path) == len(ITEM.split()) - 12
    doc = Document(text=said, id="x")
    assert Decontaminate(tmp_path).filter(doc) is not dropped
    assert doc.metadata.get("filter_reason", "").startswith("fox: ") is dropped


def test_figures_count_among_the_thirteen_words(tmp_path):
    question = "A train leaves at 7 and travels 120 miles in 2 hours with 3 stops on its way home"
    write_index([("sum", question)], tmp_path)
    assert not Decontaminate(tmp_path).filter(Document(text=question, id=""))
    assert Decontaminate(tmp_path).filter(Document(text=question.replace("120", "150").replace("2 hours", "5 hours"), id=""))
