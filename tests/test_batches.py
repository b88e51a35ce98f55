"Which sequences each process reads, what is masked between documents, and the mixture that was realised."
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from domain_adapt.batches import (Vocabulary, collate, context_slice, document_numbers, heldout_data, heldout_rows, micro_batches,
                                  parts, realised, rows_of, training_data)
from domain_adapt.params import Params, validate
from domain_adapt.tokens import IndexedWriter

BLEND = pd.DataFrame([("sec", 0.7), ("none", 0.0), ("wiki", 0.3)], columns=["corpus", "asked"])
LENGTH, BATCH = 32, 4


def params_with(steps: int = 40, **train) -> Params:
    corpora = {name: dict(kind="domain", source="general", path="x") for name in ("sec", "none", "wiki")}
    return validate(dict(run="x", model="x", corpora=corpora, merge=dict(candidates=[dict(name="half", method="linear", weight=0.5)]),
                         tokens=dict(sequence_length=LENGTH, replay=0.0),
                         train=dict(steps=steps, global_batch=BATCH, micro_batch=1) | train))


def write(folder, name: str, lengths: list[int]) -> None:
    with IndexedWriter(folder / name, 1000) as writer:
        for n in lengths: writer.add([*np.random.RandomState(n).randint(1, 999, n - 1), 0])


@pytest.fixture(scope="module", autouse=True)
def one_process():
    "The data sets ask for a process group."
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("tokens"), np.random.RandomState(1)
    write(folder, "sec_train", random.randint(2, 120, 50))
    write(folder, "wiki_train", random.randint(2, 20, 60))    # many documents in a sequence, and many epochs
    write(folder, "sec_heldout", [50, 60, 90])
    return folder


def load(tokens, blend=BLEND, **how): return training_data(tokens, blend, Vocabulary(1000, 0), params_with(**how), tokens / "index")


def one_by_one(data, blend: pd.DataFrame, steps, size: int) -> pd.DataFrame:
    "The mixture, by asking the data sets for each sequence in turn."
    names, documents, counts = list(blend.loc[blend["asked"] > 0, "corpus"]), {}, {}
    for step in steps:
        for i in range((step - 1) * size, step * size):
            at, j = (data.dataset_index[i], data.dataset_sample_index[i]) if hasattr(data, "datasets") else (0, i)
            text, ids = parts(data)[at]._query_document_sample_shuffle_indices(j)
            documents.setdefault(names[at], set()).update(ids.tolist())
            counts[names[at]] = counts.get(names[at], 0) + len(text) - 1
    table = blend.copy()
    table["documents"] = [len(documents.get(c, ())) for c in table["corpus"]]
    table["tokens"] = [counts.get(c, 0) for c in table["corpus"]]
    return table.assign(share=table["tokens"] / max(1, table["tokens"].sum()))


@pytest.mark.oracle
@settings(max_examples=30, deadline=None)
@given(steps=st.sets(st.integers(1, 40)))
def test_the_realised_mixture_is_what_a_loop_counts(tokens, steps):
    data = load(tokens)
    pd.testing.assert_frame_equal(realised(data, BLEND, steps, BATCH), one_by_one(data, BLEND, steps, BATCH))


@pytest.mark.oracle
def test_of_one_corpus_too(tokens):
    blend = pd.DataFrame([("wiki", 1.0)], columns=["corpus", "asked"])
    data, steps = load(tokens, blend), [1, 2, 7]
    table = realised(data, blend, steps, BATCH)
    pd.testing.assert_frame_equal(table, one_by_one(data, blend, steps, BATCH))
    assert table["tokens"].tolist() == [3 * BATCH * LENGTH] and 0 < table["documents"][0] < 60


def test_skipped_updates_are_not_counted(tokens):
    data = load(tokens)
    every, some = (realised(data, BLEND, steps, BATCH) for steps in (range(1, 41), [1]))
    assert every["tokens"].sum() == 40 * BATCH * LENGTH and some["tokens"].sum() == BATCH * LENGTH
    assert every["tokens"][1] == some["tokens"][1] == 0 and list(every["corpus"]) == ["sec", "none", "wiki"]
    assert abs(every["share"][0] - 0.7) < 0.02 and every["documents"][2] == 60    # more than an epoch of wiki
    assert realised(data, BLEND, [], BATCH)["share"].tolist() == [0, 0, 0]


def test_ten_million_sequences_take_seconds():
    random, n, documents = np.random.RandomState(0), 10_000_000, 2_000_000
    def part(samples):
        ends = np.sort(random.randint(0, documents, samples + 1)).astype(np.int32)
        return SimpleNamespace(shuffle_index=random.permutation(samples), sample_index=np.stack([ends, ends], 1),
                               document_index=random.permutation(documents).astype(np.int32), config=SimpleNamespace(sequence_length=4096))
    corpus = (random.rand(n) < 0.3).astype(np.int16)
    within = np.where(corpus == 0, np.cumsum(corpus == 0), np.cumsum(corpus == 1)) - 1
    data = SimpleNamespace(datasets=[part(int((corpus == i).sum())) for i in (0, 1)], dataset_index=corpus, dataset_sample_index=within)
    started = time.perf_counter()
    table = realised(data, BLEND, range(1, n // 2048 + 1), 2048)
    assert time.perf_counter() - started < 20    # 2 seconds on an idle core
    assert table["tokens"].sum() == n // 2048 * 2048 * 4096 and 0.29 < table["share"][2] < 0.31


@given(step=st.integers(1, 9), micro=st.integers(1, 4), share=st.integers(1, 4), world=st.integers(1, 5))
def test_processes_share_a_batch_without_overlap(step, micro, share, world):
    rows = rows_of(step, micro * share * world)
    each = [micro_batches(rows, micro, rank, world) for rank in range(world)]
    assert [i for mine in each for m in mine for i in m] == list(rows)
    assert {len(m) for mine in each for m in mine} == {micro} and {len(mine) for mine in each} == {share}


@given(size=st.integers(1, 5), piece=st.integers(1, 4))
def test_context_slices_share_a_sequence_without_overlap_and_have_equal_work(size, piece):
    x = torch.arange(2 * size * piece)[None]
    slices = [context_slice(x, rank, size) for rank in range(size)]
    assert sorted(torch.cat(slices, 1)[0].tolist()) == x[0].tolist()
    assert len({s.sum().item() for s in slices}) == 1    # keys seen by all queries of a process


@given(st.integers(0, 200), st.integers(1, 4), st.integers(1, 5), st.integers(1, 300))
def test_heldout_sequences_are_measured_once_by_equally_many_micro_batches(available, micro, world, wanted):
    params = params_with(global_batch=micro, micro_batch=micro, validation=dict(tokens=wanted))
    each = [heldout_rows(available, params, rank, world) for rank in range(world)]
    assert len({len(mine) for mine in each}) == 1 and {len(m) for mine in each for m in mine} <= {micro}
    rows = [i for mine in each for m in mine for i in m if i is not None]
    assert rows == list(range(min(available, -(-wanted // LENGTH))))


@pytest.mark.parametrize("end", ["attend", "mask_loss", "separate"])
def test_the_token_after_a_document_is_not_counted_unless_documents_attend(tokens, end):
    data = load(tokens, end_of_document=end)
    batch = collate(data, range(8), end == "separate")
    ends = batch["tokens"] == 0
    assert ends.any() and torch.equal(batch["loss_mask"], torch.ones(8, LENGTH) if end == "attend" else (~ends).float())
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    if end != "separate": assert batch["documents"] is None; return
    slow = [[sum(t == 0 for t in row[:i]) for i in range(LENGTH)] for row in batch["tokens"].tolist()]
    assert batch["documents"].tolist() == slow


def test_documents_stay_whole_where_the_sequence_is_split(tokens):
    data = load(tokens)
    whole, halves = collate(data, range(4), True), [collate(data, range(4), True, rank, 2) for rank in (0, 1)]
    for rank, half in enumerate(halves):
        assert torch.equal(half["documents"], whole["documents"])
        for key in ("tokens", "labels", "loss_mask"): assert torch.equal(half[key], context_slice(whole[key], rank, 2))
    assert document_numbers(torch.tensor([[5, 0, 0, 5]]), 0).tolist() == [[0, 0, 1, 2]]


def test_order_does_not_depend_on_how_a_run_is_cut_and_repeats_itself(tokens):
    a, b = load(tokens), load(tokens, micro_batch=2)
    assert all(torch.equal(a[i]["tokens"], b[i]["tokens"]) for i in range(0, 160, 7))


def test_a_last_sequence_that_is_not_full_is_masked(tokens):
    held = heldout_data(tokens, Vocabulary(1000, 0), params_with(), tokens / "index")
    assert list(held) == ["sec"] and len(held["sec"]) == 7    # 200 tokens, one more than labels
    batch = collate(held["sec"], range(7), False)
    assert batch["loss_mask"].sum() == 199 and batch["labels"].max() < 1000 and batch["tokens"].min() >= 0
