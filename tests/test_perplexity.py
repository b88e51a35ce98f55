"Blocks, scores and their summary against lm-eval's rolling log-likelihood and plain cross-entropy."
import gzip
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import perplexity
from domain_adapt.models import load_model, load_tokenizer
from domain_adapt.params import Corpus, UserError
from domain_adapt.perplexity import by_length, comparisons, document_blocks, heldout_blocks, score_blocks, selection_blocks, spread, summarise, window_nll

CONTRACT = ("variant,tokens_seen,corpus,kind,half,documents,blocks,tokens,bytes,token_perplexity,word_perplexity,byte_perplexity,"
            "bits_per_byte,ci_low,ci_high,dtype").split(",")
TEXTS = [f"Net sales of store {i} rose by {i * 7}.{i} % to €{i},{i:03d} million — see\n\n Item {i}. " * (1 + i % 7) for i in range(44)]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama): return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama): return load_model(tiny_llama, "fp32")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    "A tokens folder with two corpora that hold text out, and their corpora with one that holds none."
    folder = tmp_path_factory.mktemp("tokens")
    for name, texts in (("sec", TEXTS[-2:]), ("wiki", TEXTS)):
        with gzip.open(folder / f"{name}_heldout.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(dict(id=f"{name}-{i}", text=t, metadata={})) + "\n" for i, t in enumerate(texts))
    kinds = {"sec": "domain", "wiki": "general", "news": "general"}
    return folder, {n: Corpus(kind=k, source="general", path="x", heldout=0.5 if n != "news" else 0.0) for n, k in kinds.items()}


@pytest.fixture(scope="module")
def blocks(held, tokenizer): return heldout_blocks(*held, tokenizer, max_tokens=6000, block=48)


@pytest.mark.oracle
@pytest.mark.parametrize("size", [48, 1024])
def test_whole_documents_score_as_in_lm_eval(model, tokenizer, size):
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=size)
    theirs = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(TEXTS[:12])], disable_tqdm=True)
    windows = [document_blocks(t, tokenizer, size) for t in TEXTS[:12]]
    nats = [window_nll(model, [(w["context"], w["ids"]) for w in ws]) for ws in windows]
    ours = [-sum(n) for n in nats]
    assert ours == pytest.approx(theirs, rel=1e-4)
    frame = pd.DataFrame([dict(variant="original", corpus="c", kind="domain", half="report", document=i, block=w["block"], tokens=len(w["ids"]),
                               bytes=w["bytes"], words=w["words"], nll=n, dtype="fp32")
                          for i, ws in enumerate(windows) for w, n in zip(ws, nats[i])])
    row = summarise(frame, {"original": 0}, 0).iloc[0]
    per_word = [(ll, len(re.split(r"\s+", t))) for ll, t in zip(theirs, TEXTS)]
    per_byte = [(ll, len(t.encode())) for ll, t in zip(theirs, TEXTS)]
    assert row["word_perplexity"] == pytest.approx(weighted_perplexity(per_word), rel=1e-4)
    assert row["byte_perplexity"] == pytest.approx(weighted_perplexity(per_byte), rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(bits_per_byte(per_byte), rel=1e-4)


@pytest.mark.parametrize("dtype, near", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_block_costs_its_cross_entropy(tiny_llama, blocks, dtype, near):
    model, b = load_model(tiny_llama, dtype), max(blocks, key=lambda b: len(b.ids))
    with torch.inference_mode():
        logits = model(torch.tensor([[*b.context, *b.ids[:-1]]])).logits[0, -len(b.ids):].float()
        exact = torch.nn.functional.cross_entropy(logits, torch.tensor(b.ids), reduction="sum").item()
    assert score_blocks(model, [b], "original")["nll"][0] == pytest.approx(exact, rel=near)


@pytest.mark.parametrize("dtype, near", [("fp32", 1e-6), ("bf16", 5e-3)])
def test_a_score_depends_on_its_company_by_rounding_alone(tiny_llama, blocks, dtype, near):
    model = load_model(tiny_llama, dtype)
    together = score_blocks(model, blocks, "v")["nll"].tolist()
    assert together == pytest.approx([score_blocks(model, [b], "v")["nll"][0] for b in blocks], rel=near)
    assert together == score_blocks(model, blocks, "v")["nll"].tolist()
    assert together == pytest.approx(score_blocks(model, blocks[::-1], "v")["nll"].tolist()[::-1], rel=near)


@given(st.lists(st.integers(1, 60)), st.integers(1, 100))
def test_runs_by_length_hold_everything_once_and_no_more_than_asked(lengths, most):
    made = list(by_length(lengths, most))
    assert sorted(i for b in made for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= most for b in made)
    longest = [lengths[i] for b in made for i in b]
    assert longest == sorted(lengths, reverse=True)


def test_logits_of_a_window_are_never_whole(model, tokenizer):
    seen, head = [], model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    try: window_nll(model, [([1], tokenizer.encode(TEXTS[6] * 5)[:700])])
    finally: hook.remove()
    assert sum(seen) == 700 and max(seen) <= perplexity.SLICE


def test_a_head_that_does_more_than_multiply_is_taken_as_it_is(blocks):
    from transformers import GraniteConfig, GraniteForCausalLM
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                             num_key_value_heads=2, logits_scaling=3.0, bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval()
    b = blocks[0]
    with torch.inference_mode():
        exact = torch.nn.functional.cross_entropy(model(torch.tensor([[*b.context, *b.ids[:-1]]])).logits[0, -len(b.ids):], torch.tensor(b.ids), reduction="sum").item()
    assert not perplexity.linear_head(model)
    assert score_blocks(model, [b], "v")["nll"][0] == pytest.approx(exact, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=60) | st.text(" \n\tab€", min_size=1), size=st.integers(1, 9))
def test_bytes_words_and_tokens_of_windows_add_up(tokenizer, text, size):
    found = document_blocks(text, tokenizer, size)
    assert sum(w["bytes"] for w in found) == len(text.encode())
    assert sum(w["words"] for w in found) == len(re.split(r"\s+", text))
    assert tokenizer.decode([i for w in found for i in w["ids"]], clean_up_tokenization_spaces=False) == text
    assert found[0]["context"] == [tokenizer.bos_token_id]
    for before, w in zip(found, found[1:]):
        assert len(w["context"]) + len(w["ids"]) == size + 1 and w["context"] == (before["ids"])[-len(w["context"]):]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(0, 2000))
def test_spread_stays_within_the_limit_and_uses_it(lengths, most):
    picked = spread(lengths, most) if lengths else []
    assert picked == sorted(set(picked)) and sum(lengths[i] for i in picked) <= max(most, 0)
    if lengths and most >= 64 * 2: assert len(picked) >= min(len(lengths), most // 64)


def test_halves_alternate_and_both_read_every_part_of_the_text(blocks, held):
    wiki = [b for b in blocks if b.corpus == "wiki"]
    assert [b.half for b in wiki][:6] == ["select", "report"] * 3
    for half in ("select", "report"):
        at = [int(b.document.split("-")[1]) for b in wiki if b.half == half]
        assert at == sorted(at) and at[0] < 4 and at[-1] > 39
    assert {b.corpus for b in blocks} == {"sec", "wiki"} and sum(len(b.ids) for b in wiki) <= 6000


@settings(max_examples=25, deadline=None)
@given(reported=st.integers(200, 9000), chosen_on=st.integers(0, 9000))
def test_what_is_chosen_on_and_what_is_reported_never_share_a_block(held, tokenizer, reported, chosen_on):
    blocks = lambda found, half: {(b.corpus, b.document, b.block) for b in found if b.half == half}
    report, select = heldout_blocks(*held, tokenizer, reported, 48), selection_blocks(*held, tokenizer, chosen_on, 48)
    assert len(blocks(select, "select")) == len(select) and sum(len(b.ids) for b in select) <= chosen_on
    assert not blocks(select, "select") & blocks(report, "report") and blocks(report, "report")


def test_what_one_corpus_lacks_the_other_gives(held, tokenizer):
    every = selection_blocks(*held, tokenizer, 10**9, 48)
    size = lambda found, corpus: sum(len(b.ids) for b in found if b.corpus == corpus)
    found = selection_blocks(*held, tokenizer, most := size(every, "sec") + 2000, 48)
    assert size(every, "wiki") > 4000 and size(found, "sec") == size(every, "sec") and most - 100 < sum(len(b.ids) for b in found) <= most


def test_too_little_text_for_two_halves_is_an_error(held, tokenizer):
    with pytest.raises(UserError, match=r"corpora.sec: .* block\(s\) of evaluate.perplexity.block = 500 .*max_tokens = 200"):
        heldout_blocks(*held, tokenizer, max_tokens=200, block=500)


def test_no_held_out_domain_is_an_error(held, tokenizer):
    folder, corpora = held
    with pytest.raises(UserError, match="no domain corpus has held-out documents"):
        heldout_blocks(folder, {"wiki": corpora["wiki"]}, tokenizer, 1000, 48)


def test_a_model_that_cannot_read_the_blocks_is_an_error(blocks):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(UserError, match="evaluate.perplexity.block: 48 is more than the 16 tokens cpt can read"):
        score_blocks(LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=16, **config)), blocks, "cpt")
    with pytest.raises(UserError, match="vocabularies differ"):
        score_blocks(LlamaForCausalLM(LlamaConfig(vocab_size=50, pad_token_id=2, **config)), blocks, "cpt")


@pytest.fixture(scope="module")
def scored(make_model, model, blocks, tmp_path_factory):
    other = tmp_path_factory.mktemp("models") / "other"
    make_model(other, seed=1)
    return pd.concat([score_blocks(model, blocks, "original"), score_blocks(load_model(other, "fp32"), blocks, "cpt")], ignore_index=True)


def test_the_summary_is_the_contracts(scored):
    table = summarise(scored, {"original": 0, "cpt": 96}, 0)
    assert list(table) == CONTRACT and len(table) == 2 * 2 * 3
    assert ((table["ci_low"] < table["bits_per_byte"]) & (table["bits_per_byte"] < table["ci_high"])).all()
    assert np.allclose(np.log2(table["byte_perplexity"]), table["bits_per_byte"]) and set(table["dtype"]) == {"fp32"}
    halves = table.pivot_table(index=["variant", "corpus"], columns="half", values=["tokens", "bytes", "blocks"], aggfunc="sum")
    for what in ("tokens", "bytes", "blocks"): assert (halves[what]["select"] + halves[what]["report"] == halves[what]["all"]).all()
    one_half = summarise(scored[scored["half"] == "select"], {"original": 0, "cpt": 96}, 0)
    pd.testing.assert_frame_equal(one_half, table[table["half"] == "select"].reset_index(drop=True))


def test_the_same_seed_writes_the_same_csv(scored, model, blocks):
    again = pd.concat([score_blocks(model, blocks, "original"), scored[scored["variant"] == "cpt"]], ignore_index=True)
    assert again.to_csv() == scored.to_csv()
    seen = {"original": 0, "cpt": 96}
    assert summarise(again, seen, 5).to_csv() == summarise(scored, seen, 5).to_csv() != summarise(scored, seen, 6).to_csv()


def test_a_comparison_turned_round_is_its_mirror(scored):
    there, back = comparisons(scored, "cpt", "original", 0), comparisons(scored, "original", "cpt", 0)
    assert [r["measure"] for r in there] == ["bits_per_byte/sec", "bits_per_byte/wiki"]
    for a, b in zip(there, back):
        assert (a["difference"], a["p"]) == (-b["difference"], b["p"]) and a["ci_low"] == pytest.approx(-b["ci_high"])
