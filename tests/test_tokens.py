"""The split, the blend, and token files as Megatron itself reads them."""
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from domain_adapt.mixture import check_mixture, epochs, mixture
from domain_adapt.models import load_tokenizer
from domain_adapt.params import Params, UserError, validate
from domain_adapt.tokens import IndexedWriter, encoder, held_out, read_documents, split_documents, tokenize

steadily = settings(deadline=None, derandomize=True)
IDS = st.lists(st.text("abcdefgh/0123456789_-", min_size=1, max_size=12), min_size=1, max_size=60, unique=True)


def run(corpora: dict[str, dict], model: str = "m", seed: int = 0, tokens: dict = {}, train: dict = {}) -> Params:
    given = {n: dict(kind="domain", source="general", path=n) | c for n, c in corpora.items()}
    return validate(dict(run="t", seed=seed, model=model, corpora=given, tokens=dict(sequence_length=16, replay=0) | tokens,
                         train=dict(global_batch=2, micro_batch=2) | train,
                         merge=dict(candidates=[dict(name="half", method="linear", weight=0.5)])))


@pytest.fixture
def ingest(tmp_path):
    "A function that writes documents {id: text} of a corpus as ingest leaves them, in so many files; its folder is .folder."
    def save(corpus: str, texts: dict[str, str], files: int = 1) -> None:
        folder = save.folder / "documents" / corpus
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(files):
            with gzip.open(folder / f"{i:05d}.jsonl.gz", "wt") as f:
                for d in list(texts)[i::files]:
                    f.write(json.dumps(dict(text=texts[d], id=d, metadata=dict(corpus=corpus, source_path=f"/data/{d}.HTML"))) + "\n")
    save.folder = tmp_path / "ingest"
    return save


def texts(name: str, n: int, words: int = 60) -> dict[str, str]:
    return {f"{name}-{i}": " ".join(f"{name}{i}x{j}" for j in range(words)) for i in range(n)}


def stage(params: Params, ingest, out: Path) -> Path:
    out.mkdir()
    tokenize(params, {"ingest": ingest.folder}, out)
    return out


def read_bin(prefix: Path, dtype=np.uint16) -> list[int]: return np.fromfile(f"{prefix}.bin", dtype).tolist()


# The split

@steadily
@given(IDS, st.floats(0, 1), st.integers(0, 5), st.randoms())
def test_share_is_exact_and_ignores_order(ids, share, seed, random):
    documents = [(d, f"{d}.html") for d in ids]
    if share and not round(share * len(ids)):
        with pytest.raises(UserError, match="is none"): held_out(documents, share, seed, "c")
        return
    held = held_out(documents, share, seed, "c")
    assert held <= set(ids) and len(held) == round(share * len(ids))
    random.shuffle(documents)
    assert held_out(documents, share, seed, "c") == held
    assert held <= held_out(documents, 1.0, seed, "c") == set(ids)


@steadily
@given(IDS, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_a_larger_share_only_adds(ids, a, b):
    documents = [(d, d) for d in ids]
    small, large = sorted((a, b))
    if round(small * len(ids)): assert held_out(documents, small, 3, "c") <= held_out(documents, large, 3, "c")


def test_share_depends_on_the_seed():
    documents = [(f"d{i}", "") for i in range(100)]
    assert len({frozenset(held_out(documents, 0.3, seed, "c")) for seed in range(5)}) == 5


@steadily
@given(IDS, st.data())
def test_patterns_name_ids_or_files_in_any_case(ids, data):
    documents = [(d, f"File-{i}.HTML") for i, d in enumerate(ids)]
    i = data.draw(st.integers(0, len(ids) - 1))
    assert held_out(documents, [f"FILE-{i}.*"], 0, "c") == {ids[i]}
    assert held_out(documents, [ids[i].upper()], 0, "c") == {ids[i]}
    assert held_out(documents, [f"file-{i}.html", ids[0]], 0, "c") == {ids[i], ids[0]}


def test_pattern_that_matches_nothing():
    with pytest.raises(UserError, match=r"corpora\.sec\.heldout: pattern '\*tgx\*' matches none of the 2 documents \(tgt.html, b\)"):
        held_out([("a", "tgt.html"), ("b", "")], ["*tgt*", "*tgx*"], 0, "sec")


@steadily
@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from("ab")), min_size=4, max_size=30), st.floats(0.1, 0.9), st.integers(0, 3))
def test_no_text_is_trained_on_and_held_out(tmp_path_factory, drawn, share, seed):
    "Texts repeat within and across two corpora; what is held out of either is trained on in none."
    folder = tmp_path_factory.mktemp("split")
    found = {c: {f"{c}{i}": f"text {t}" for i, (t, d) in enumerate(drawn) if d == c} for c in "ab"}
    if not all(round(share * len(v)) for v in found.values()): return
    for c, v in found.items():
        (folder / c).mkdir()
        with gzip.open(folder / c / "0.jsonl.gz", "wt") as f:
            for d, t in v.items(): f.write(json.dumps(dict(id=d, text=t, metadata={})) + "\n")
    splits = split_documents(run({c: dict(heldout=share) for c in found}, seed=seed), folder)
    assert {c: set(v) for c, v in splits.items()} == {c: set(v) for c, v in found.items()}
    of = lambda split: {found[c][d] for c in found for d, s in splits[c].items() if s == split}
    assert not of("train") & of("heldout") and of("dropped") <= of("heldout")
    shutil.rmtree(folder)


def test_split_of_one_corpus_ignores_the_others(ingest):
    ingest("a", texts("a", 20))
    alone = split_documents(run(dict(a=dict(heldout=0.3))), ingest.folder / "documents")["a"]
    ingest("b", texts("b", 9))
    assert split_documents(run(dict(b=dict(heldout=0.5), a=dict(heldout=0.3))), ingest.folder / "documents")["a"] == alone


# The files

@pytest.mark.oracle
@pytest.mark.parametrize("vocabulary", [300, 65499, 65500, 130000])
def test_megatron_reads_what_was_written(tmp_path, vocabulary):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
    r = np.random.default_rng(vocabulary)
    documents = [r.integers(0, vocabulary, n).tolist() for n in (5, 1, 700, 33)] + [[vocabulary - 1]]
    with IndexedWriter(tmp_path / "d", vocabulary) as w:
        for d in documents: w.add(d)
    read = IndexedDataset(str(tmp_path / "d"))
    assert len(read) == 5 and [d.tolist() for d in read] == documents
    assert read.index.dtype == DType.optimal_dtype(vocabulary)
    assert read.document_indices.tolist() == [0, 1, 2, 3, 4, 5] and read.sequence_lengths.tolist() == [5, 1, 700, 33, 1]
    assert read.get(2, offset=100, length=7).tolist() == documents[2][100:107]


@pytest.mark.oracle
def test_same_files_as_megatrons_builder(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    documents = [[3, 1, 2], [7], list(range(200))]
    theirs = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.uint16)
    for d in documents: theirs.add_document(torch.tensor(d), [len(d)])
    theirs.finalize(str(tmp_path / "t.idx"))
    with IndexedWriter(tmp_path / "o", 300) as w:
        for d in documents: w.add(d)
    for end in ("bin", "idx"): assert (tmp_path / f"o.{end}").read_bytes() == (tmp_path / f"t.{end}").read_bytes()


def test_id_outside_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match="gives id 300.*vocab_size 300"):
        with IndexedWriter(tmp_path / "d", 300) as w: w.add([1, 300])
    assert not (tmp_path / "d.idx").exists()


@pytest.mark.parity
def test_ids_are_the_tokenizers_own(tiny_llama):
    tokenizer, whole = load_tokenizer(tiny_llama), ["Net sales", "naïve ½ 三\n\n", "", "x" * 5000]
    encode = encoder(load_tokenizer(tiny_llama), "tiny")
    assert encode(whole) == [[*tokenizer(t).input_ids, tokenizer.eos_token_id] for t in whole]


def test_special_tokens_within_text_are_text(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    (ids,) = encoder(tokenizer, "tiny")([f"a{tokenizer.eos_token}b"])
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[:-1]) == f"a{tokenizer.eos_token}b"


@pytest.mark.parametrize("adds_eos", [False, True])
def test_bos_only_where_the_tokenizer_adds_it_and_eos_once(tiny_llama, adds_eos):
    from tokenizers.processors import TemplateProcessing
    tokenizer = load_tokenizer(tiny_llama)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    plain = encoder(tokenizer, "tiny")(["ab"])[0]
    assert plain[0] != tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}" if adds_eos else f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)])
    assert encoder(tokenizer, "tiny")(["ab"]) == [[tokenizer.bos_token_id, *plain]]


def test_tokenizer_without_eos(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="model mine: .*no EOS.*eos_token"): encoder(tokenizer, "mine")


def test_stage(ingest, tiny_llama, tmp_path):
    sec, wiki, news = texts("sec", 6), texts("wiki", 10), texts("news", 3)
    ingest("sec", sec | {"copy": news["news-1"]}, files=2)
    ingest("wiki", wiki)
    ingest("news", news)
    params = run(dict(sec=dict(heldout=["sec-[01].html"]), wiki=dict(kind="general", heldout=0.2), news=dict(kind="general", heldout=1.0)),
                 model=str(tiny_llama), tokens=dict(replay=0.1))
    out = stage(params, ingest, tmp_path / "out")
    tokenizer = load_tokenizer(tiny_llama)
    ids = lambda text: [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [f"{c}_{s}.{e}" for c, s in [("sec", "train"), ("sec", "heldout"), ("wiki", "train"), ("wiki", "heldout"), ("news", "heldout")]
         for e in ("bin", "idx")] + [f"{c}_heldout.jsonl.gz" for c in ("sec", "wiki", "news")] + ["splits.csv"])
    kept = [d["id"] for d in read_documents(ingest.folder / "documents" / "sec") if d["id"] in ("sec-2", "sec-3", "sec-4", "sec-5")]
    assert read_bin(out / "sec_train") == sum((ids(sec[d]) for d in kept), [])
    assert read_bin(out / "news_heldout") == sum(map(ids, news.values()), [])
    with gzip.open(out / "sec_heldout.jsonl.gz", "rt") as f: held = [json.loads(line) for line in f]
    assert {d["id"]: d["text"] for d in held} == {d: sec[d] for d in ("sec-0", "sec-1")} and held[0]["metadata"]["corpus"] == "sec"
    splits = pd.read_csv(out / "splits.csv").set_index(["corpus", "split"])
    assert splits["documents"].to_dict() == {("sec", "train"): 4, ("sec", "heldout"): 2, ("sec", "dropped"): 1, ("wiki", "train"): 8,
        ("wiki", "heldout"): 2, ("wiki", "dropped"): 0, ("news", "train"): 0, ("news", "heldout"): 3, ("news", "dropped"): 0}
    assert splits.loc[("sec", "train"), "tokens"] == len(read_bin(out / "sec_train"))
    assert splits.loc[("news", "heldout"), "bytes"] == sum(len(t.encode()) for t in news.values())
    blend = mixture(params, splits.reset_index())
    assert list(blend.columns) == ["corpus", "asked", "documents", "tokens", "share"] and blend["corpus"].tolist() == list(params.corpora)
    assert np.allclose(blend["asked"], [0.9, 0.1, 0]) and np.isclose(blend["share"].sum(), 1)


@pytest.mark.equality
def test_two_runs_give_the_same_bytes(ingest, tiny_llama, tmp_path):
    ingest("sec", texts("sec", 30), files=3)
    params = run(dict(sec=dict(heldout=0.3)), model=str(tiny_llama), seed=4)
    a, b = (stage(params, ingest, tmp_path / name) for name in "ab")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_what_cannot_be_trained_on(ingest, tiny_llama, tmp_path):
    ingest("sec", texts("sec", 4))
    ingest("wiki", texts("wiki", 4))
    ingest("small", {"one": "few words"})
    ingest("empty", {})
    n = iter(range(99))

    def refused(corpora: dict, match: str, **sections) -> None:
        with pytest.raises(UserError, match=match): stage(run(corpora, model=str(tiny_llama), **sections), ingest, tmp_path / f"out{next(n)}")

    refused(dict(sec=dict(heldout=1.0)), "sec: no document of kind domain is left to train on")
    refused(dict(sec=dict(heldout=["sec-*"])), "sec: no document of kind domain")
    refused(dict(sec=dict(heldout=["*tgt*"])), r"corpora\.sec\.heldout: pattern '\*tgt\*'")
    refused(dict(empty={}), r"corpora\.empty: .*funnel\.csv")
    refused(dict(small={}), r"small: 10 training tokens .*train\.global_batch 2 x \(tokens\.sequence_length 16 \+ 1\) = 34")
    refused(dict(sec={}, wiki=dict(kind="general", heldout=["wiki*"])), "tokens.replay is 0.1, but", tokens=dict(replay=0.1))
    refused(dict(sec={}, small=dict(kind="general")), r"corpora\.small: 10 training tokens .* one sequence", tokens=dict(replay=0.1))
    ingest("twice", {"a": "one"}); folder = ingest.folder / "documents" / "twice"
    shutil.copy(folder / "00000.jsonl.gz", folder / "00001.jsonl.gz")
    refused(dict(twice={}), "two documents have the id 'a'")


def test_with_a_given_checkpoint_everything_may_be_held_out(ingest, tiny_llama, tmp_path):
    ingest("sec", texts("sec", 4))
    out = stage(run(dict(sec=dict(heldout=1.0)), model=str(tiny_llama), train=dict(checkpoint="elsewhere")), ingest, tmp_path / "out")
    assert (out / "sec_heldout.bin").is_file() and not (out / "sec_train.bin").exists()


# The blend

@steadily
@given(st.lists(st.tuples(st.sampled_from(["domain", "general"]), st.integers(1, 10**12)), min_size=1, max_size=8), st.floats(0, 0.99))
def test_blend_sums_to_one_and_keeps_replay(drawn, replay):
    drawn = [("domain", 5), ("general", 7), *drawn]
    params = run({f"c{i}": dict(kind=k) for i, (k, _) in enumerate(drawn)}, tokens=dict(replay=replay))
    counts = pd.DataFrame([dict(corpus=f"c{i}", split=s, documents=1, tokens=t if s == "train" else 999)
                           for i, (_, t) in enumerate(drawn) for s in ("heldout", "train")])
    table = mixture(params, counts)
    general = np.array([k == "general" for k, _ in drawn])
    assert np.isclose(table["asked"].sum(), 1) and np.isclose(table["asked"][general].sum(), replay) and np.isclose(table["share"].sum(), 1)
    for kind in (general, ~general):
        ratio = (table["asked"] / table["tokens"])[kind]
        assert np.allclose(ratio, ratio.iloc[0])
    seen = epochs(params, table)
    assert np.isclose((seen["epochs"] * table["tokens"]).sum(), params.train.steps * 2 * 16)


def test_one_batch_is_enough():
    params = run(dict(c={}))
    params = params.model_copy(update=dict(train=params.train.model_copy(update=dict(max_epochs=100.0))))
    counts = lambda tokens: pd.DataFrame([dict(corpus="c", split="train", documents=1, tokens=tokens)])
    check_mixture(params, mixture(params, counts(34)))
    with pytest.raises(UserError, match="33 training tokens"): check_mixture(params, mixture(params, counts(33)))
