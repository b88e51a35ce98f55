"Questions that a model behind a real web server writes, what is sorted out, and blocks against lm-eval and transformers."
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from domain_adapt import questions as room
from domain_adapt.models import load_model, load_tokenizer
from domain_adapt.params import UserError
from domain_adapt.perplexity import score_blocks, summarise
from domain_adapt.questions import (LONGEST, REASONS, SHORTEST, Endpoint, Passage, Service, abstract_blocks, closed_book_blocks, counts,
                                    messages, passages, questions, read_reply, rejected, replies, sift)
from domain_adapt.runs import read_lines
from domain_adapt.sources.patents import documents, part, patent
from servers.openai import KEY, OpenAI

WORDS = "amber bolt copper damper enamel flange gasket hinge insulator jacket keel lever magnet nozzle orifice piston quartz rivet".split()


ASK = [dict(role="user", content="Title: Flask 1\n")]


def material(n: int) -> str: return f"{WORDS[n % 18]}{n}"


def held_out(n: int = 12) -> list[dict]:
    "Patents with a passage each, in which one word is the answer."
    def one(i: int) -> dict:
        text = f"The sealing ring of the flask consists of {material(i)}. " + "It is pressed by a cam against the neck. " * 12
        doc = patent(dict(title=f"Flask {i}", date="", url=""), abstract="A flask.", description=text, claims="1. A flask.")
        return dict(id=f"US{i}", text=doc.text, metadata=doc.metadata)
    return [one(i) for i in range(n)]


def good(text: str) -> str:
    "A good question from a prompt's last passage."
    number = text.rpartition("Title: Flask ")[2].split("\n")[0]
    return json.dumps(dict(question=f"Which material does flask type {number} have between lid and bottle?", answer=material(int(number))))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "Outputs of a test's own, a key, and short pauses."
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("WRITER_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"): monkeypatch.delenv(name, raising=False); monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(room, "Service", functools.partial(Service, wait=0.01))


@pytest.fixture
def server():
    with OpenAI(good) as s: yield s


def endpoint(server, **more) -> Endpoint: return Endpoint(**dict(url=server.url, model="writer-1", key_env="WRITER_KEY", timeout=10) | more)


def no_secret_below(folder: Path) -> None:
    for f in folder.rglob("*"):
        if f.is_file(): assert KEY.encode() not in f.read_bytes() and KEY[3:].encode() not in f.read_bytes(), f


# the service

@pytest.mark.server
def test_good_answers_are_saved_with_their_source_and_without_the_key(server, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    docs = held_out()
    kept = questions(docs, endpoint(server), 10, tmp_path / "out")
    lines = list(read_lines(tmp_path / "out" / "questions.jsonl"))
    assert lines == kept.to_dict("records") and len(lines) == 10
    by_id = {d["id"]: d for d in docs}
    for line in lines:
        assert list(line) == ["question", "answer", "document", "passage", "model", "prompt"]
        assert line["answer"] in line["passage"] and line["passage"] in part(by_id[line["document"]]["text"], by_id[line["document"]]["metadata"], "description")
        assert line["model"] == f"writer-1 at {server.url}" and len(line["prompt"]) == 16
    assert len({line["document"] for line in lines}) == 10 and (tmp_path / "out" / "rejected.jsonl").read_text() == ""
    assert {k for _, _, k, _ in server.log} == {KEY} and all(b["model"] == "writer-1" and b["temperature"] == 0 for *_, b in server.log)
    no_secret_below(tmp_path)
    said = capfd.readouterr()
    assert KEY not in caplog.text + said.out + said.err and "chat/completions" in caplog.text


@pytest.mark.server
def test_what_was_answered_is_not_asked_again(server, tmp_path):
    first = questions(held_out(), endpoint(server), 6, tmp_path / "a")
    assert len(server.log) == 6
    again = questions(held_out(), endpoint(server), 6, tmp_path / "b")
    assert len(server.log) == 6 and (tmp_path / "a" / "questions.jsonl").read_bytes() == (tmp_path / "b" / "questions.jsonl").read_bytes()
    pd.testing.assert_frame_equal(first, again)
    questions(held_out(), endpoint(server, model="writer-2"), 6, tmp_path / "c")
    assert len(server.log) == 12
    questions(held_out(), endpoint(server, timeout=20, key_env="OTHER_KEY"), 6, tmp_path / "d")
    assert len(server.log) == 12


@pytest.mark.server
@pytest.mark.parametrize("fault", [(500, b"oops", {}), (503, b"", {"Retry-After": "soon"}), (429, b"slow down", {"Retry-After": "0"}), (408, b"", {}),
                                   "drop", b"<html>gateway</html>", b'{"choices": []}', b'{"error": null}', b"[" * 100_000, b"\xff\xfe", "drip", 1.2])
def test_what_may_pass_is_asked_again(server, fault):
    server.faults, start = [fault] * 2, time.monotonic()
    assert replies([messages(p) for p in passages(held_out(), 1)], endpoint(server, timeout=0.6)) == [good("Title: Flask 6\n")]
    assert len(server.log) == 3 and time.monotonic() - start < 30


@pytest.mark.server
@pytest.mark.parametrize("asked", ["1", "date"])
def test_retry_after_is_honoured(server, asked):
    from email.utils import formatdate
    server.faults = [(429, b"", {"Retry-After": asked if asked == "1" else formatdate(time.time() + 2.5, usegmt=True)})]
    Service(endpoint(server), "k", wait=0.01).ask(ASK)
    (first, *_), (second, *_) = server.log
    assert second - first >= (1 if asked == "1" else 1.4)


@pytest.mark.server
@pytest.mark.parametrize("wanted", ["86400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_day_of_rest_is_an_error_at_once(server, wanted):
    server.faults = [(429, b"", {"Retry-After": wanted})]
    with pytest.raises(UserError, match="asks to come back in .* seconds .HTTP 429."): Service(endpoint(server), "k").ask(ASK)
    assert len(server.log) == 1


@pytest.mark.server
def test_an_answer_without_end_is_given_up(server):
    server.faults = ["endless"] * 2
    with pytest.raises(UserError, match="gives no reply: its answer is over 4 MB"): Service(endpoint(server), "k", wait=0.01, attempts=2).ask(ASK)


@pytest.mark.server
def test_trouble_that_does_not_pass_is_one_error_and_what_came_is_kept(server, tmp_path):
    talks = [messages(p) for p in passages(held_out(), 8)]
    replies(talks[:5], endpoint(server))
    server.faults = [(502, f"bad gateway {KEY}".encode(), {})] * 1000
    with pytest.raises(UserError, match=r"^evaluate.questions: http://127.*/chat/completions gives no reply: HTTP 502: bad gateway \[key\]; run again") as e:
        replies(talks, endpoint(server))
    assert KEY not in str(e.value) and e.value.__cause__ is None
    server.faults, server.log[:] = [], []
    assert len(replies(talks, endpoint(server))) == 8 and sorted(server.prompts()) == sorted(t[-1]["content"] for t in talks[5:])


@pytest.mark.server
@pytest.mark.parametrize("fault, match", [
    ((400, b'{"error": {"message": "max_tokens is not supported\\u001b[31m\\n by this"}}', {}), "HTTP 400.*max_tokens is not supported.*check url, model and request"),
    ((404, b"", {}), "HTTP 404.*check url and model"), ((403, f"key {KEY} may not".encode(), {}), r"HTTP 403.: key \[key\] may not"),
    ((302, b"", {"Location": "/elsewhere"}), "HTTP 302.*not followed"), ((307, b"", {"Location": "http://127.0.0.1:1/"}), "HTTP 307.*not followed")])
def test_a_refusal_is_one_clear_error(server, fault, match):
    server.faults = [fault]
    with pytest.raises(UserError, match=match) as e: Service(endpoint(server), "evaluate.questions").ask(ASK)
    assert len(server.log) == 1 and str(e.value).startswith("evaluate.questions: http://") and KEY not in str(e.value) and "\x1b" not in str(e.value)


@pytest.mark.server
def test_a_wrong_key_ends_the_work_and_is_not_shown(server, monkeypatch, tmp_path):
    monkeypatch.setenv("WRITER_KEY", wrong := "sk-wrong-9876543210")
    with pytest.raises(UserError, match=r"HTTP 401.*Incorrect API key provided: \[key\].*check the key in WRITER_KEY") as e:
        questions(held_out(40), endpoint(server), 40, tmp_path / "out")
    assert wrong not in str(e.value) and len(server.log) <= 12 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, "", "  ", "sk-\nbroken-1234", "schlüssel-1234"])
def test_a_key_that_cannot_be_sent_is_an_error_that_does_not_show_it(monkeypatch, value):
    monkeypatch.delenv("WRITER_KEY") if value is None else monkeypatch.setenv("WRITER_KEY", value)
    with pytest.raises(UserError, match="k.key_env: the environment variable WRITER_KEY") as e:
        Service(Endpoint(url="http://127.0.0.1:1", model="m", key_env="WRITER_KEY"), "k")
    assert "1234" not in str(e.value)


@pytest.mark.parametrize("wrong", [dict(url="http://jo:pass@host/v1"), dict(url="https://host/v1?key=abc"), dict(url="ftp://host"), dict(url="host/v1"),
                                   dict(url="http://[::1"), dict(url="http://host:port/"), dict(key_env="sk-abc"), dict(key_env="abc123"), dict(key=KEY)])
def test_an_endpoint_says_where_but_never_the_key(wrong):
    with pytest.raises(ValidationError): Endpoint(**dict(url="http://host/v1", model="m") | wrong)


@pytest.mark.server
def test_without_a_key_none_is_sent():
    with OpenAI(lambda _: "{}", key="") as s:
        assert Service(Endpoint(url=s.url + "/", model="m"), "k").ask(ASK) == "{}" and s.log[0][1:3] == ("/v1/chat/completions", "")


@pytest.mark.server
def test_hostile_replies_are_counted_and_the_key_stands_nowhere(tmp_path):
    escaped = "".join(f"\\u{ord(c):04X}" for c in KEY)
    hostile = ["I cannot do that.", None, "", "{" * 50_000, '{"question":' * 5_000, '{"question": "Why?", "answer": ["a"]}', "\ud800 {",
               '{"question": "\\ud800\\u0000?", "answer": "\\u001b[2J"}', f"my key is {KEY}", json.dumps(dict(question=f"What is {KEY} for?", answer="cam")),
               '{"question": "Which tool is %s and what does it press?", "answer": "neck"}' % escaped,
               '{"question": "Is %s pressing?", "answer": "yes"}' % KEY.replace("/", "\\/"), good("Title: Flask 12\n")]
    told = iter(hostile)
    with OpenAI(lambda _: next(told)) as server:
        kept = questions(held_out(13), endpoint(server), 13, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "questions.csv").set_index("outcome")["questions"]
    assert table.sum() == 13 and table["unparsable"] == 8 and list(table.index) == ["kept", *REASONS] and table["kept"] == len(kept)
    assert len(list(read_lines(tmp_path / "out" / "rejected.jsonl"))) == 13 - len(kept)
    no_secret_below(tmp_path)
    stored = [v for f in (tmp_path / "outputs").rglob("*.jsonl") for line in f.read_text().splitlines() for v in json.loads(line).values()]
    assert len(stored) == 13 and not any(KEY in str(read_reply(v)) for v in stored) and sum("[key]" in v for v in stored) == 4


def test_hiding_and_reading_take_no_long_time():
    hide, start = room._hider(KEY), time.process_time()
    for text in ("\\" * 4_000_000, KEY[:-1] * 200_000, "\\u00" * 1_000_000): assert hide(text) == text
    for text in ("{" * 4_000_000, '{"question":"' * 300_000, "<think>" * 500_000): assert read_reply(text) is None
    rejected("above " * 4000, "a" * 20_000, "figure " * 4000)
    room.passages_of(dict(id="a", text="FIG " * 10 + ". " * 300_000 + "\n" * 300_000 + "1 " * 300_000, metadata={}))
    assert time.process_time() - start < 40


@pytest.mark.server
@pytest.mark.fault
def test_a_killed_generation_goes_on_where_it_was(tmp_path):
    def slowly(text): time.sleep(0.25); return good(text)
    code = ("import sys; sys.path.insert(0, 'tests'); from test_questions import *; "
            "replies([messages(p) for p in passages(held_out(20), 20)], Endpoint(url=sys.argv[1], model='m', key_env='WRITER_KEY'))")
    with OpenAI(slowly) as server:
        child = subprocess.Popen([sys.executable, "-c", code, server.url], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                                 cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE)
        while len(server.log) < 10 and child.poll() is None: time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(server.log) >= 10, child.stderr.read().decode()[-2000:]
        stored = sum(len(f.read_bytes().splitlines()) for f in (tmp_path / "outputs").rglob("*.jsonl"))
        asked = len(server.log)
        found = replies([messages(p) for p in passages(held_out(20), 20)], Endpoint(url=server.url, model="m", key_env="WRITER_KEY"))
        assert 5 <= stored < 20 and len(server.log) - asked == 20 - stored and [json.loads(r)["answer"] for r in found] == [material(i) for i in range(20)]


# a model of ours

@pytest.fixture(scope="module")
def writer(tmp_path_factory, make_model) -> Path:
    "A random Llama that reads the prompts, which are long in a byte-level tokenizer."
    folder = tmp_path_factory.mktemp("models") / "writer"
    make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=8192)))
    return folder


def test_a_model_of_ours_writes_and_what_it_cannot_write_is_counted(writer, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"of 2 questions none is kept \(unparsable: 2\); choose an abler model"):
        questions(held_out(), str(writer), 2, tmp_path / "out", "fp32")
    assert [r["reason"] for r in read_lines(tmp_path / "out" / "rejected.jsonl")] == ["unparsable"] * 2
    assert (tmp_path / "out" / "questions.jsonl").read_text() == ""
    monkeypatch.setattr(room, "load_model", lambda *_, **__: pytest.fail("loaded again"))
    first = (tmp_path / "out" / "rejected.jsonl").read_bytes()
    with pytest.raises(UserError): questions(held_out(), str(writer), 2, tmp_path / "out", "fp32")
    assert (tmp_path / "out" / "rejected.jsonl").read_bytes() == first


def test_a_model_that_cannot_read_a_prompt_is_an_error(tiny_llama):
    with pytest.raises(UserError, match="reads 2048 tokens, and a prompt with its reply takes"):
        replies([messages(p) for p in passages(held_out(), 1)], str(tiny_llama), "fp32")


def test_few_passages_come_from_far_apart():
    assert [p.document for p in passages(held_out(12), 3)] == ["US2", "US6", "US10"]


def test_no_passage_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no held-out document has a passage of 80 words"):
        questions([dict(id="a", text="Short.", metadata={})], "nowhere", 5, tmp_path)


# passages, filters

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["A cam presses it.", "word " * 30 + "end.", "x " * 260, "# Head", "| a |", "FIG. 2 is it.", "In FIG. 2 it is."]),
                         max_size=30), max_size=6), st.integers(1, 40))
def test_passages_are_whole_and_spread(texts, number):
    docs = [dict(id=str(i), text="\n\n".join(t), metadata={}) for i, t in enumerate(texts)]
    every = {d["id"]: room.passages_of(d) for d in docs}
    found = passages(docs, number)
    assert len(found) == len(set(enumerate(found))) == min(number, sum(map(len, every.values())))
    for p in found:
        assert SHORTEST <= len(p.text.split()) <= LONGEST and p in every[p.document] and not p.text.startswith(("#", "|", "FIG"))
    with_any = [d for d, ps in every.items() if ps]
    assert len({p.document for p in found}) == min(number, len(with_any))
    assert [int(p.document) for p in found] == sorted(int(p.document) for p in found)


FLASK = ("The stopper has a groove in which a ring of silicone rubber is seated, and it is closed by a cam. Trials at 60.5 °C lasted 1,200 hours "
         "and the H₂O pump ran on. A lever (16a) moves arm 118 by about 50 mm.")


@pytest.mark.parametrize("question, answer, reason", [
    ("Which material is the sealing ring made of?", "silicone rubber", ""),
    ("Which material is the sealing ring made of?", "The SILICONE rubber.", ""),
    ("At which heat was the bottle tried?", "60.5 °C", ""), ("At which heat was the bottle tried?", "60.4 °C", "not answerable"),
    ("At which heat was the bottle tried?", "60 °C", "not answerable"), ("How many hours?", "1,200", ""), ("How many hours?", "1200", "not answerable"),
    ("What did it pump?", "H2O", ""), ("Which material is used?", "natural rubber", "not answerable"), ("Which material is it?", "rubbery", "not answerable"),
    ("", "silicone", "trivial: empty"), ("Which?", "", "trivial: empty"), ("?!", "silicone", "trivial: empty"), ("Which?", "...", "trivial: empty"),
    ("Is silicone used?", "yes", "trivial: yes or no"), ("Is silicone used?", "No.", "trivial: yes or no"),
    ("Is silicone used?", "Yes, it is.", "trivial: yes or no"), ("Is it of silicone?", "True", "trivial: yes or no"),
    ("What is it?", "it is", "trivial: the answer says nothing"),
    ("What is a ring of silicone rubber?", "rubber of silicone", "trivial: the answer stands in the question"),
    ("What seals?", "silicone " * 21, "trivial: the answer is over 20 words"), ("What seals?", "silicone " * 20, ""),
    ("What is the ring in the passage made of?", "silicone", "trivial: it speaks of its source"),
    ("What is the ring of this Patent made of?", "silicone", "trivial: it speaks of its source"),
    ("Which material is named above?", "silicone", "trivial: it speaks of its source"),
    ("What moves the arm 118?", "a lever", "trivial: it names parts by their numbers"),
    ("What moves an arm?", "lever 16a", "trivial: it names parts by their numbers"),
    ("What moves an arm?", "a lever (16a)", "trivial: it names parts by their numbers"), ("How far does a lever move the arm?", "about 50 mm", ""),
    ("What moves the arm by about 50 mm?", "a lever", ""), ("At which heat did trials at 60.5 end?", "1,200 hours", ""),
    ("Which of the following seals it?", "silicone", "trivial: it speaks of its source"),
    ("Which of the above seals it?", "silicone", "trivial: it speaks of its source"),
    ("What of the kinds listed below, if any, seals?", "silicone", "trivial: it speaks of its source"),
    ("What is provided in the groove of a stopper above 50 °C?", "silicone", ""),
    ("What does the present application use?", "silicone", "trivial: it speaks of its source"),
    ("What is this device made of?", "silicone", "trivial: it speaks of its source"),
    ("What is said ring made of?", "silicone", "trivial: it speaks of its source"),
    ("What does Fig. 3 show?", "silicone", "trivial: it speaks of its source"), ("What is in the preferred embodiment?", "silicone", "trivial: it speaks of its source"),
    ("In the context described herein, what seals?", "silicone", "trivial: it speaks of its source"),
    ("What is silicone in the application of paint?", "a cam", ""), ("Which configuration is patentable?", "a cam", ""),
    ("The stopper has a groove in which a ring is seated of what?", "silicone", "copied"),
    ("Why has a groove in which a ring of silicone been cut?", "a cam", "copied"), ("Why does a groove in which a ring of felt lies exist?", "a cam", "")])
def test_the_filters(question, answer, reason): assert rejected(question, answer, FLASK) == reason


def test_the_worked_examples_would_be_kept():
    for e in room._asking()["examples"]: assert rejected(e["question"], e["answer"], e["passage"]) == ""


def test_duplicates_and_the_worked_examples_are_asked_once():
    say = lambda q: json.dumps(dict(question=q, answer="elasticity"))
    told = [say("What is the ring made of?"), say("  what IS the ring, made of"), say("The ring is made of what?"), say("What is a lid's ring made of?"),
            say(room._asking()["examples"][0]["question"])]
    assert [*sift([Passage("a", "", FLASK + " It keeps elasticity.")] * 5, told)["reason"]] == ["", "duplicate", "duplicate", "", "duplicate"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.builds(lambda q, a: json.dumps(dict(question=" ".join(q), answer=" ".join(a))), *[
    st.lists(st.sampled_from(FLASK.split() + ["What", "Which", "yes", "patent", "felt"]), max_size=24)] * 2)), max_size=12))
def test_every_reply_is_kept_or_counted(told):
    found = sift([Passage(str(i), "", FLASK) for i in range(len(told))], told)
    assert len(found) == len(told) == counts(found)["questions"].sum() and set(found["reason"]) <= {"", *REASONS}
    kept = found[found["reason"] == ""]
    for q in kept.itertuples():
        asked, said = room.words_of(q.question), room.words_of(q.answer)
        content = {w for w in said if w not in room.STOP}
        assert content and content <= set(room.words_of(FLASK)) and not content <= set(asked) and len(q.answer.split()) <= 20
        assert " ".join(asked) not in " ".join(room.words_of(FLASK)) or len(asked) < 8
    assert kept["question"].str.casefold().is_unique
    json.dumps(found.to_dict("records"), ensure_ascii=False).encode()


# blocks

@pytest.fixture(scope="module")
def tokenizer(tiny_llama): return load_tokenizer(tiny_llama)


ASKED = [dict(question="What seals the flask?", answer="a ring of α-silicone", document="US1"), dict(question="How warm is it?", answer="60.5 °C", document="US2"),
         dict(question="Which gas?", answer="argon", document="US1"), dict(question="How many?", answer="3", document="US3")]


def cross_entropy(model, context, ids) -> float:
    with torch.inference_mode(): logits = model(torch.tensor([[*context, *ids[:-1]]])).logits[0, -len(ids):].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()


@pytest.mark.oracle
def test_closed_book_blocks_cost_what_lm_eval_says(tiny_llama, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = load_model(tiny_llama, "fp32")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    texts = [(f"<s>Question: {q['question']}\nAnswer:", f" {q['answer']}") for q in ASKED]
    theirs = [nats for nats, _ in lm.loglikelihood([Instance("loglikelihood", {}, t, i) for i, t in enumerate(texts)], disable_tqdm=True)]
    blocks = closed_book_blocks(ASKED, tokenizer)
    ours = score_blocks(model, blocks, "original")
    assert (-ours["nll"]).tolist() == pytest.approx(theirs, rel=1e-4)
    assert ours["nll"].tolist() == pytest.approx([cross_entropy(model, b.context, b.ids) for b in blocks], rel=1e-5)
    assert [(b.document, b.block) for b in blocks] == [("US1", 0), ("US2", 0), ("US1", 1), ("US3", 0)]
    row, = summarise(ours, {"original": 0}, 0).to_dict("records")
    assert (row["corpus"], row["kind"], row["half"], row["documents"], row["blocks"]) == ("patents/closed_book", "task", "report", 3, 4)
    assert row["bytes"] == sum(len(q["answer"].encode()) for q in ASKED)


@pytest.mark.oracle
def test_tokens_at_the_join_are_lm_evals(tokenizer):
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator([f"Question: {q['question']}\nAnswer: {q['answer']}" for q in ASKED] * 9,
                            trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    learnt = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    lm = HFLM.__new__(HFLM)
    lm.backend, lm.add_bos_token, lm.custom_prefix_token_id = "causal", False, None
    for t in (tokenizer, learnt):
        lm.tokenizer = t
        for q, b in zip(ASKED, closed_book_blocks(ASKED, t)):
            theirs = lm._encode_pair(f"Question: {q['question']}\nAnswer:", f" {q['answer']}")
            assert (b.context[1:], b.ids) == theirs and b.context[0] == t.bos_token_id
    assert len(closed_book_blocks(ASKED, learnt)[2].ids) < len(" argon")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=st.text(st.characters(exclude_categories=("Cs",)), max_size=30), answer=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
def test_context_and_answer_are_the_whole_text(tokenizer, question, answer):
    b, = closed_book_blocks([dict(question=question, answer=answer, document="d")], tokenizer)
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not any(t in question + answer for t in ("<s>", "</s>", "<unk>")):
        assert decode(b.context[1:]) == f"Question: {question}\nAnswer:" and decode(b.ids) == f" {answer}"
    assert (b.bytes, b.words) == (len(answer.encode()), len(answer.split()))


def read_all(dev_data) -> list[dict]:
    files = sorted(f for f in (dev_data / "patents").iterdir() if "docling_tables" not in f.name)
    return [dict(id=f"{f.name}-{i}", text=d.text, metadata=d.metadata) for f in files for i, d in enumerate(documents(f))]


@pytest.mark.parametrize("longest", [2048, 10**6])
def test_abstracts_of_real_patents(dev_data, tokenizer, longest):
    docs = read_all(dev_data)
    blocks, became = abstract_blocks(docs, tokenizer, longest)
    by_id = {d["id"]: d for d in docs}
    assert sum(became.values()) == len(docs) == 22 and became["no abstract"] == 3 and len(blocks) == became["whole"] + became["cut"] >= 12
    assert became["cut" if longest == 10**6 else "whole"] == 0
    for b in blocks:
        d = by_id[b.document]
        abstract, context = part(d["text"], d["metadata"], "abstract"), tokenizer.decode(b.context[1:])
        assert tokenizer.decode(b.ids) == f" {abstract}" and b.bytes == len(abstract.encode()) and len(b.context) + len(b.ids) - 1 <= longest
        assert context.endswith(f"\n\nTitle: {d['metadata']['title']}\nAbstract:") and abstract not in context and "## Abstract" not in context
        assert part(d["text"], d["metadata"], "claims")[-200:] not in context and b.context[0] == tokenizer.bos_token_id
        if longest == 2048: assert len(b.context) + len(b.ids) - 1 == longest
        else: assert context.startswith(part(d["text"], d["metadata"], "description"))


@pytest.mark.oracle
def test_abstract_blocks_cost_their_cross_entropy(tiny_llama, tokenizer):
    about, model = dict(title="Seal", date="", url=""), load_model(tiny_llama, "fp32")
    texts = [patent(about, abstract=f"A ring {i} closes it.", description="Flasks leak. " * (5 + 40 * i), claims="1. A ring.") for i in range(3)]
    blocks, became = abstract_blocks([dict(id=str(i), text=d.text, metadata=d.metadata) for i, d in enumerate(texts)], tokenizer, 400)
    scored = score_blocks(model, blocks, "cpt")
    assert scored["nll"].tolist() == pytest.approx([cross_entropy(model, b.context, b.ids) for b in blocks], rel=1e-5)
    assert dict(became) == dict(whole=1, cut=2) and set(scored["corpus"]) == {"patents/abstract"} and scored["tokens"].tolist() == [len(b.ids) for b in blocks]


def test_patents_that_cannot_be_foretold_are_counted(tokenizer):
    about, said = dict(title="Seal", date="", url=""), "A ring of rubber is pressed by a cam against the neck of a flask, so that it closes."
    texts = [dict(abstract=said, description="Flasks leak."), dict(abstract=said), dict(description="Flasks leak."), dict(claims="1. A ring."),
             dict(abstract=said * 9, description="Flasks leak."), dict(abstract=said, description=f"It leaks. In short,\n\n{said.upper()} As said."),
             dict(abstract=said, description=said + " Flasks leak." * 80)]
    made = [patent(about, **t) for t in texts]
    blocks, became = abstract_blocks([dict(id=str(i), text=d.text, metadata=d.metadata) for i, d in enumerate(made)], tokenizer, 600)
    assert [b.document for b in blocks] == ["0", "6"]
    assert dict(became) == {"whole": 1, "no description": 2, "no abstract": 1, "abstract over half of what is read": 1,
                            "abstract stands in the description": 1, "cut": 1}
