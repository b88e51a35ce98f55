"Prompts, scores and the evaluate stage against lm-eval's own tasks and model."
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import asking, benchmarks, suites
from domain_adapt.answers import Answers
from domain_adapt.asking import Remembering, SharedContext, Variant, reads_trees
from domain_adapt.benchmarks import evenly, load_suite, run_suite, samples_file, shares
from domain_adapt.stats import read_blocks
from domain_adapt.evaluation import evaluate, task_settings
from domain_adapt.models import load_model, load_tokenizer
from domain_adapt.params import Questions, Slurm, Suite, UserError, load_params, validate
from domain_adapt.perplexity import heldout_blocks, score_blocks
from domain_adapt.runs import PACKAGE, ROOT, write_csv, write_json

ITEMS = ROOT / "tests" / "tiny" / "benchmarks"
BENCHMARKS = "variant,suite,task,metric,value,stderr,ci_low,ci_high,n,fewshot,chat_template,dtype,seed,cut".split(",")
COMPARISONS = "variant,against,measure,difference,ci_low,ci_high,p,q,smallest_detectable,verdict".split(",")
STOCK = {"arc_easy": "arc/arc_easy", "boolq": "super_glue/boolq/default", "hellaswag": "hellaswag/hellaswag", "piqa": "piqa/piqa"}
NASTY = {"hellaswag": dict(ctx_a=' It\'s [header] a "test" [title] of  two  blanks ', ctx_b="THE crowd", activity_label=" Roof\\n "),
         "piqa": dict(goal="Who's \"there\"? {{x}}", sol1='Say "it\'s me" \\ twice', sol2="Don't.\n")}


@pytest.fixture(scope="module")
def suite(): return load_suite("quick", Suite(limit=None, data=str(ITEMS)))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama): return load_tokenizer(tiny_llama)


def stock_task(name: str, items: list[dict]):
    "lm-eval's own task of that name on our items."
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    path = Path(lm_eval.__file__).parent / "tasks" / (STOCK.get(name) or f"mmlu/default/{name}")
    config = {k: v for k, v in load_yaml(path.with_suffix(".yaml"), resolve_func=True).items() if k not in ("tag", "dataset_path")}
    split, fewshot = config.get("test_split") or config["validation_split"], config.get("fewshot_split")
    data = {s: Dataset.from_list(items) for s in {split, fewshot, config.get("training_split")} - {None}}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: data, "num_fewshot": 0})


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["arc_easy", "boolq", "hellaswag", "mmlu_business", "piqa"])
def test_prompts_choices_and_answers_are_lm_evals(name):
    ours = next(t.task for t in load_suite("quick", Suite(limit=None, data=str(ITEMS))) if t.name == name)
    items = [dict(d) for d in ours.eval_docs]
    from datasets import Dataset
    items += [items[0] | NASTY.get(name, {})] + ([items[1] | dict(endings=["a [b] c", "it's [title] so", '"q"  x', "\\ y "])] if name == "hellaswag" else [])
    ours._dataset = ours.dataset = {"items": Dataset.from_list(items)}
    for subject in {d.get("subject") for d in items}:
        mine = [d for d in items if d.get("subject") == subject]
        given = [d | dict(label=int(d["answer"]), idx=0) for d in mine] if name == "boolq" else mine
        theirs = stock_task(f"mmlu_{subject}" if subject else name, given)
        for a, b in zip(mine, theirs.eval_docs, strict=True):
            assert ours.fewshot_context(a, num_fewshot=0) == theirs.fewshot_context(b, num_fewshot=0)
            assert ours.doc_to_choice(a) == theirs.doc_to_choice(b)
            assert int(ours.doc_to_target(a)) == int(theirs.doc_to_target(b))
        assert {m["metric"] for m in ours.config.metric_list} == {m["metric"] for m in theirs.config.metric_list}
        assert ours.config.target_delimiter == theirs.config.target_delimiter and ours.VERSION == theirs.VERSION


def tiny(kind: str, **settings):
    "A random model of an architecture, in fp32."
    import transformers
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 bos_token_id=1, eos_token_id=2, pad_token_id=2)
    if kind == "GPT2": sizes = dict(vocab_size=320, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    if kind == "Bloom": sizes = dict(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    if kind == "Gemma2": sizes |= dict(head_dim=8, final_logit_softcapping=1.0)
    return getattr(transformers, f"{kind}ForCausalLM" if kind not in ("GPT2",) else "GPT2LMHeadModel")(
        getattr(transformers, f"{kind}Config")(**sizes | settings)).eval()


@pytest.mark.oracle
@pytest.mark.parametrize("kind, trees", [("Llama", True), ("Mistral", True), ("Qwen2", True), ("GPT2", True), ("Gemma2", False), ("Bloom", False)])
def test_log_likelihoods_are_lm_evals(suite, tokenizer, kind, trees):
    from lm_eval.models.huggingface import HFLM
    model = tiny(kind, **(dict(sliding_window=16) if kind == "Mistral" else {}))    # shorter than the prompts
    assert reads_trees(model) == trees
    ours, theirs = (benchmarks.ask(lm, suite) for lm in (SharedContext(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)))
    for name in theirs:
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-3)
            assert {k: v for k, v in a.items() if k != "loglikelihoods"} == {k: v for k, v in b.items() if k != "loglikelihoods"}


@pytest.mark.oracle
def test_long_prompts_are_cut_as_lm_eval_cuts_them(suite, tokenizer):
    from lm_eval.models.huggingface import HFLM
    model = tiny("Llama", max_position_embeddings=64)
    ours, theirs = (benchmarks.ask(lm, suite) for lm in (SharedContext(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)))
    assert any(len(tokenizer.encode(s["prompt"])) > 64 for s in ours["mmlu_business"])
    for name in theirs:
        for a, b in zip(ours[name], theirs[name], strict=True): assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-3)


@pytest.mark.oracle
@torch.inference_mode()
def test_of_equal_tokens_greedy_decoding_writes_the_first(tokenizer):
    from lm_eval.models.huggingface import HFLM
    model = tiny("Llama")
    model.get_output_embeddings().weight.zero_()
    asked = [(None, [1, 2], more) for more in ([0], [3], [0, 0], [0, 3])]
    ours, theirs = (lm._loglikelihood_tokens(asked) for lm in (SharedContext(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer)))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] == [True, False, True, False]


def test_a_score_does_not_depend_on_the_batch(suite, tokenizer, tiny_llama, monkeypatch):
    model, found = load_model(tiny_llama, "fp32"), []
    for size in (1, 200, 4096):
        monkeypatch.setattr(asking, "PLACES", size)    # a constant, varied here so that trees meet other company
        found.append([s["loglikelihoods"] for a in benchmarks.ask(SharedContext(model, tokenizer), suite).values() for s in a])
    for a, b, c in zip(*found): assert a == pytest.approx(b, abs=1e-4) and a == pytest.approx(c, abs=1e-4)


def test_choices_share_one_reading_of_their_context(suite, tokenizer, tiny_llama):
    model, read = load_model(tiny_llama, "fp32"), []
    lm = SharedContext(model, tokenizer)
    hook = model.base_model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    try: answered = benchmarks.ask(lm, [t for t in suite if t.name == "boolq"])["boolq"]
    finally: hook.remove()
    once = [len(tokenizer.encode(s["prompt"])) + sum(len(c) - 1 for c in s["choices"]) for s in answered]
    assert sum(once) <= sum(read) < 1.2 * sum(once)


def test_choices_stay_together_in_the_parts_they_are_asked_in(suite, tokenizer, tiny_llama, tmp_path, monkeypatch):
    real, parts, read = SharedContext._loglikelihood_tokens, [], []
    def counted(self, requests, *rest): parts.append([tuple(c) for _, c, _ in requests]); return real(self, requests, *rest)
    monkeypatch.setattr(SharedContext, "_loglikelihood_tokens", counted)
    monkeypatch.setattr(asking, "PART", 16)
    monkeypatch.setattr(asking, "tree_logprobs", lambda model, trees: read.extend(trees) or [[(-1.0, False) for _ in t.branches] for t in trees])
    monkeypatch.setattr(asking, "reads_trees", lambda model: True)
    benchmarks.ask(Remembering(Variant("v", tiny_llama, "fp32", tokenizer, Answers(tmp_path))), suite)
    contexts = {c for p in parts for c in p}
    assert len(parts) > 8 and len(contexts) <= len(read) <= len(contexts) + len(parts) - 1    # only a part's end may cut an item


def test_items_are_spread_over_parts_and_positions():
    assert shares([500, 3, 500], 100) == [49, 3, 48] and sum(shares([282, 103, 234, 114, 390, 238], 100)) == 100
    assert shares([5, 0], 100) == [5, 0] and evenly(100, 4) == [12, 37, 62, 87] and evenly(3, 3) == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 120) | st.none())
def test_shares_are_dealt_out_one_by_one(sizes, limit):
    given = [0] * len(sizes)
    for _ in range(sum(sizes) if limit is None else min(limit, sum(sizes))):
        given[min((i for i, n in enumerate(sizes) if given[i] < n), key=lambda i: given[i])] += 1
    assert shares(sizes, limit) == given


def test_the_slice_of_mmlu_asks_every_subject():
    task = next(t for t in load_suite("quick", Suite(limit=12, data=str(ITEMS))) if t.name == "mmlu_business")
    assert len(task.items) == 12 and len({i.split("/")[0] for i in task.items}) == 6
    assert task.task.eval_docs[0]["subject"] == task.items[0].split("/")[0]


def test_items_may_be_arrow_parquet_or_jsonl(tmp_path):
    from datasets import Dataset
    rows = [dict(goal=f"g{i}", sol1="a", sol2="b", label=i % 2) for i in range(5)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "arrow")
    (tmp_path / "parquet").mkdir(), data.to_parquet(tmp_path / "parquet" / "x.parquet")
    (tmp_path / "jsonl").mkdir(), (tmp_path / "jsonl" / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = dict(task="x", dataset_path="x", metadata={})
    for kind in ("arrow", "parquet", "jsonl"):
        (tmp_path / kind / "hf_datasets").mkdir()
        (tmp_path / kind / "hf_datasets" / "x").symlink_to(tmp_path / kind)
        assert list(suites.items(config, dict(split="test", folder="x"), [str(tmp_path), str(tmp_path / kind)])) == rows


@pytest.mark.parametrize("name, suite, message", [
    ("quack", Suite(), "evaluate.suites.quack: no such suite; known: .*quick"),
    ("quick", Suite(data="tests/tiny/filings"), "none of data .tests/tiny/filings. has task arc_easy: looked for ai2_arc"),
    ("quick", Suite(data="no/such/folder"), "no such file or folder"),
    ("quick", Suite(data="hub"), "the hub did not give .* check the network")])
def test_absent_suites_and_items_are_one_clear_error(name, suite, message, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message): load_suite(name, suite)


def test_a_task_without_items_is_an_error(tmp_path):
    shutil.copytree(ITEMS, tmp_path / "copy")
    (tmp_path / "copy/hf_datasets/piqa/plain_text/validation/items.jsonl").write_text("")
    with pytest.raises(UserError, match="task piqa has no items"): load_suite("quick", Suite(data=str(tmp_path / "copy")))


def test_task_files_can_run_no_code():
    for f in (PACKAGE / "tasks").rglob("*"): assert f.is_dir() or (f.suffix == ".yaml" and "!function" not in f.read_text())


def test_rows_and_samples(suite, tokenizer, tiny_llama, tmp_path):
    named = lambda name: Variant(name, tiny_llama, "fp32", tokenizer, Answers(tmp_path / name))
    rows = pd.DataFrame(run_suite(named("merge:a"), "quick", suite, 7, tmp_path))
    run_suite(named("again"), "quick", suite, 7, tmp_path)
    assert set(rows) == set(BENCHMARKS) and ((rows["ci_low"] <= rows["value"]) & (rows["value"] <= rows["ci_high"])).all()
    from lm_eval.api.metrics import mean_stderr
    for r in rows.itertuples():
        text = samples_file(tmp_path, "merge:a", r.task).read_text()
        kept = [json.loads(line) for line in text.splitlines()]
        right = [s[r.metric] for s in kept]
        assert (r.value, r.n) == (np.mean(right), len(right)) and r.stderr == pytest.approx(mean_stderr(right))
        for s in kept: assert s["acc"] == float(np.argmax(s["loglikelihoods"]) == s["target"])
        assert text == samples_file(tmp_path, "again", r.task).read_text() and str(ROOT) not in text and str(tmp_path) not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_model, tokenizer):
    "params of the tiny run, and folders as tokens, train and merge leave them."
    import gzip
    root = tmp_path_factory.mktemp("run")
    params = load_params(ROOT / "params" / "tiny.yaml", ("evaluate.perplexity.max_tokens=3000", "evaluate.contamination=false"))
    folders = {s: root / s for s in ("tokens", "train", "merge")}
    for f in folders.values(): f.mkdir()
    for name, n in (("sec", 1), ("encyclopedia", 8), ("news", 25)):
        with gzip.open(folders["tokens"] / f"{name}_heldout.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(dict(id=f"{i}", text=f"{name} {i} rose by {i}.{i} million in the year. " * (60 if n == 1 else 9), metadata={})) + "\n"
                         for i in range(n))
    for seed, step in enumerate((4, 8), 1): make_model(folders["train"] / "hf" / f"step_{step}", seed=seed)
    (folders["train"] / "metrics.jsonl").write_text("".join(json.dumps(dict(step=i, tokens=512 * i, loss=1.0)) + "\n" for i in range(9)))
    for seed, c in enumerate(params.merge.candidates, 3): make_model(folders["merge"] / c.name, seed=seed)
    blocks = [b for b in heldout_blocks(folders["tokens"], params.corpora, tokenizer, 3000, 128) if b.half == "select"]
    tried = {"original": ROOT / params.model, "cpt": folders["train"] / "hf" / "step_8"} | {f"merge:{c.name}": folders["merge"] / c.name for c in params.merge.candidates}
    write_csv(folders["merge"] / "blocks.csv", pd.concat([score_blocks(load_model(f, "fp32"), blocks, v) for v, f in tried.items()]))
    write_json(folders["merge"] / "selection.json", dict(order=["slerp-0.5"], kept=["slerp-0.5"], winner="slerp-0.5", rule="", notes={}))
    return params, folders


@pytest.fixture(scope="module")
def evaluated(made, tmp_path_factory):
    "The stage's folder, and how many blocks of each variant it scored."
    out, scored = tmp_path_factory.mktemp("evaluate"), {}
    real = asking.score_blocks
    def counted(model, blocks, variant): scored[variant] = len(blocks); return real(model, blocks, variant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "score_blocks", counted)
        patch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        evaluate(*made, out)
    return out, scored


def test_the_stage_writes_the_contracts_tables(evaluated, made):
    out, params = evaluated[0], made[0]
    variants = ["original", "cpt@4", "cpt", "merge:slerp-0.5"]    # not the merges that were tried and not kept
    perplexity, scores, compared = (pd.read_csv(out / f"{n}.csv") for n in ("perplexity", "benchmarks", "comparisons"))
    assert list(perplexity["variant"].unique()) == variants and len(perplexity) == len(variants) * 3 * 3
    assert dict(perplexity.groupby("variant")["tokens_seen"].first()) == {v: {"original": 0, "cpt@4": 2048}.get(v, 4096) for v in variants}
    assert perplexity.loc[perplexity["corpus"] == "news", "documents"].max() == 24
    assert list(scores) == BENCHMARKS and list(scores["variant"].unique()) == ["original", "cpt", "merge:slerp-0.5"]
    assert list(compared) == COMPARISONS and set(compared["verdict"]) <= {"better", "worse", "cannot tell"}
    pairs = compared.groupby(["variant", "against"]).size()
    assert pairs["cpt", "original"] == pairs["merge:slerp-0.5", "cpt"] == 3 + 5 and pairs["cpt@4", "cpt"] == 3
    assert "original" not in pairs.index.get_level_values(0) and ("cpt", "cpt") not in pairs.index
    assert sorted(f.name for f in (out / "samples").iterdir()) == ["chat.jsonl", "cpt", "merge:slerp-0.5", "original"]


@pytest.mark.equality
def test_nothing_is_measured_twice_and_reused_scores_are_the_same(evaluated, made):
    out, scored = evaluated
    before, after = read_blocks(made[1]["merge"] / "blocks.csv"), read_blocks(out / "blocks.csv")
    size = len(after[after["variant"] == "cpt@4"])
    assert scored["cpt@4"] == size and all(n == size - len(before[before["variant"] == v]) for v, n in scored.items() if v != "cpt@4")
    assert not after.duplicated(benchmarks.KEY).any() and after.groupby("variant").size().nunique() == 1
    kept = after.merge(before, on=[*benchmarks.KEY, "half"], suffixes=("", "_before"))
    again = before[before["variant"].isin(scored)]
    assert len(kept) == len(again) > 0 and (kept["nll"] == kept["nll_before"]).all()


@pytest.mark.equality
@pytest.mark.parametrize("remembered", [False, True])
def test_two_runs_write_the_same_files(evaluated, made, tmp_path_factory, tmp_path, monkeypatch, remembered):
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    if remembered:
        evaluate(*made, tmp_path_factory.mktemp("before"))
        monkeypatch.setattr(asking, "load_model", None)    # nothing is left to ask
    evaluate(*made, tmp_path)
    same_tables(evaluated[0], tmp_path)
    assert sum(f.is_file() for f in tmp_path.rglob("*")) == 7 + 3 * 5


def side_by_side(made, **settings):
    params = made[0].model_copy(update={"evaluate": made[0].evaluate.model_copy(update=settings)})
    return params, made[1]


def same_tables(a: Path, b: Path) -> None:
    files = [f for f in sorted(f.relative_to(b) for f in b.rglob("*") if f.is_file()) if f.parts[0] != "jobs"]
    assert files == sorted(f.relative_to(a) for f in a.rglob("*") if f.is_file())
    for f in files: assert (a / f).read_bytes() == (b / f).read_bytes(), f


@pytest.mark.equality
def test_variants_measured_side_by_side_give_the_same_files(evaluated, made, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    monkeypatch.setattr(asking, "load_model", None)    # this process only puts together what the others found
    evaluate(*side_by_side(made, workers=2), tmp_path)
    same_tables(evaluated[0], tmp_path)


@pytest.mark.server
@pytest.mark.equality
def test_a_slurm_array_gives_the_same_files(evaluated, made, slurm_here, tmp_path_factory, monkeypatch):
    for key, value in slurm_here.items(): monkeypatch.setenv(key, value)
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    monkeypatch.setattr(asking, "load_model", None)
    out = tmp_path_factory.mktemp("sent")
    evaluate(*side_by_side(made, slurm=Slurm(partition="main", memory_gb=1)), out)
    same_tables(evaluated[0], out)
    script = next(out.rglob("launch_script.slurm")).read_text()
    assert "#SBATCH --array=0-3" in script and len(list((out / "jobs" / "completions").iterdir())) == 4


def test_general_texts_are_measured_beside_what_is_held_out(made, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(dict(text=f"Page {i}: {'rain ' * i}")) + "\n" for i in range(40)))
    out = tmp_path_factory.mktemp("with-texts")
    evaluate(*side_by_side(made, texts={"web": str(tmp_path / "web.jsonl")}, suites={}), out)
    table = pd.read_csv(out / "perplexity.csv").query("corpus == 'web'")
    assert set(table["variant"]) == {"original", "cpt@4", "cpt", "merge:slerp-0.5"} and set(table["kind"]) == {"general"} and set(table["half"]) == {"report", "all"}
    assert (table["documents"] > 20).all() and (table["tokens"] <= 3000).all() and table["bits_per_byte"].between(table["ci_low"], table["ci_high"]).all()
    assert "bits_per_byte/web" in set(pd.read_csv(out / "comparisons.csv")["measure"])
    blocks, text = read_blocks(out / "blocks.csv").query("corpus == 'web' and variant == 'cpt'"), f"Page 7: {'rain ' * 7}"
    assert blocks.iloc[7]["bytes"] == len(text) and blocks.iloc[7]["words"] == 10    # lm-eval counts what white space parts, also after the last


@pytest.mark.server
def test_patents_are_asked_about_and_their_abstracts_foretold(made, tmp_path_factory, tmp_path, monkeypatch):
    import gzip
    from servers.openai import KEY, OpenAI
    from test_questions import good, held_out
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("WRITER_KEY", KEY)
    tokens = tmp_path / "tokens"
    shutil.copytree(made[1]["tokens"], tokens)
    with gzip.open(tokens / "us_heldout.jsonl.gz", "wt") as f: f.writelines(json.dumps(d) + "\n" for d in held_out(25))
    out = tmp_path_factory.mktemp("patents")
    with OpenAI(good) as server:
        writer = dict(url=server.url, model="w", key_env="WRITER_KEY")
        data = made[0].model_dump(mode="json")
        data["corpora"]["us"] = dict(kind="domain", source="patents", path="none", heldout=1.0)
        data["evaluate"] |= dict(suites={}, questions=dict(writer=writer, number=22, longest=256))
        evaluate(validate(data), made[1] | {"tokens": tokens}, out)
    table = pd.read_csv(out / "perplexity.csv").query("half == 'report'").set_index(["corpus", "variant"])
    for corpus, n in (("patents/closed_book", 22), ("patents/abstract", 25)):
        assert (table.loc[corpus, "blocks"] == n).all() and (table.loc[corpus, "kind"] == "task").all() and len(table.loc[corpus]) == 4
    asked = json.loads((out / "settings.json").read_text())["questions"]
    assert asked["writer"]["key_env"] == "WRITER_KEY" and len(asked["prompt"]) == 16
    assert pd.read_csv(out / "questions" / "abstracts.csv")["patents"].sum() == 25
    assert {"bits_per_byte/patents/abstract", "bits_per_byte/patents/closed_book"} <= set(pd.read_csv(out / "comparisons.csv")["measure"])
    assert not any(KEY.encode() in f.read_bytes() for at in (out, tmp_path) for f in at.rglob("*") if f.is_file())
    with gzip.open(tokens / "us_heldout.jsonl.gz", "wt"): pass
    with pytest.raises(UserError, match="evaluate.questions: there are no held-out patents"):
        evaluate(validate(data), made[1] | {"tokens": tokens}, tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="evaluate.questions: no corpus is of source patents"):
        evaluate(*side_by_side(made, questions=Questions(writer="m")), tmp_path_factory.mktemp("none"))


@pytest.mark.fault
def test_a_killed_evaluation_goes_on_where_it_was(evaluated, made, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
    monkeypatch.setattr(asking, "PART", 5)
    real, asked, most = SharedContext._loglikelihood_tokens, [], 7
    def dies(self, requests, *rest):
        if len(asked) == most: raise KeyboardInterrupt
        asked.extend([None])
        return real(self, requests, *rest)
    monkeypatch.setattr(SharedContext, "_loglikelihood_tokens", dies)
    lives = 0
    while True:
        lives, most = lives + 1, len(asked) + 7
        try: evaluate(*made, tmp_path)
        except KeyboardInterrupt: continue
        break
    parts = [len((evaluated[0] / "samples" / v / "boolq.jsonl").read_bytes()) for v in ("original", "cpt")]
    assert lives > 3 and all(parts)
    before, after = (pd.read_csv(f / "benchmarks.csv") for f in (evaluated[0], tmp_path))
    assert before.equals(after)    # at most one part was asked twice
    questions = sum(len(json.loads(line)["choices"]) for f in (tmp_path / "samples").glob("*/*.jsonl") for line in f.read_text().splitlines())
    assert len(asked) <= -(-questions // 5) + 3 * 2


def test_what_is_remembered_is_asked_of_these_weights_alone(tiny_llama, make_model, tmp_path, monkeypatch):
    from domain_adapt.answers import answers_of
    monkeypatch.setenv("DOMAIN_ADAPT_OUTPUTS", str(tmp_path / "outputs"))
    make_model(tmp_path / "other", seed=9)
    shutil.copytree(tiny_llama, tmp_path / "copy")
    one, copy, other, precise = answers_of(tiny_llama, "fp32"), answers_of(tmp_path / "copy", "fp32"), answers_of(tmp_path / "other", "fp32"), answers_of(tiny_llama, "bf16")
    (tmp_path / "copy" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    ends = answers_of(tmp_path / "copy", "fp32")    # it stops elsewhere, so it may write something else
    assert one.folder == copy.folder and len({one.folder, other.folder, precise.folder, ends.folder}) == 4


def test_comparisons_look_at_the_half_nothing_was_chosen_on(evaluated):
    compared, table = (pd.read_csv(evaluated[0] / f"{n}.csv") for n in ("comparisons", "perplexity"))
    bits = table[table["half"] == "report"].set_index(["variant", "corpus"])["bits_per_byte"]
    for r in compared[compared["measure"].str.startswith("bits_per_byte/")].itertuples():
        corpus = r.measure.split("/")[1]
        assert r.difference == pytest.approx(bits[r.variant, corpus] - bits[r.against, corpus], abs=1e-9)


TALK = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.equality
def test_in_the_chat_template_and_with_answers_shown_as_lm_eval_does(tokenizer, tiny_llama, tmp_path):
    from lm_eval.models.huggingface import HFLM
    config = next(c for c in suites.configs("quick") if c["task"] == "boolq")
    config["metadata"]["fewshot"] = config["metadata"]["parts"]
    asked = Suite(limit=3, data=[str(ITEMS)], fewshot=1, chat_template="both")
    talks = copy.deepcopy(tokenizer)
    talks.chat_template = TALK
    tasks = [benchmarks.load_task(config, asked, chat) for chat in (False, True)]
    ours = benchmarks.ask(Remembering(Variant("v", tiny_llama, "fp32", talks, Answers(tmp_path))), tasks)
    theirs = benchmarks.ask(HFLM(pretrained=load_model(tiny_llama, "fp32"), tokenizer=talks, batch_size=1), tasks)
    for label in ("boolq", "boolq@chat"):
        for a, b in zip(ours[label], theirs[label], strict=True):
            assert a["prompt"] == b["prompt"] and a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-3)
    plain, chat = ours["boolq"][0]["prompt"], ours["boolq@chat"][0]["prompt"]
    assert plain.count("Question:") == 2 and chat.startswith(f"{talks.bos_token}[user]") and chat.count("[user]") == 2
    told = task_settings(tasks[1], talks)
    assert told["bos"] == 1 and told["chat_template"] and told["first_tokens"] == HFLM.tok_encode(
        Remembering(Variant("v", tiny_llama, "fp32", talks, Answers(tmp_path))), chat)[:8]


def test_a_chat_without_a_template_is_an_error(tokenizer, tiny_llama, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    tasks = load_suite("quick", Suite(limit=1, data=[str(ITEMS)], chat_template=True))
    with pytest.raises(UserError, match="evaluate.suites.quick.chat_template: the tokenizer of v has none"):
        run_suite(Variant("v", tiny_llama, "fp32", tokenizer, Answers(tmp_path)), "quick", tasks, 7, tmp_path)
    with pytest.raises(UserError, match="task mmlu_business has no items to show"): load_suite("quick", Suite(data=[str(ITEMS)], tasks=["mmlu_business"], fewshot=2))


FIGURES = [dict(table=dict(uid="t", table=[["", "2025", "2024"], ["Revenue", "1,200", "1,000"]]),
                paragraphs=[dict(uid="p", order=1, text="In millions.")],
                questions=[dict(uid=f"q{i}", order=1, question=f"What was revenue in {year}?", answer=[value], derivation="", scale="million",
                                answer_type="span", answer_from="table", rel_paragraphs=[], req_comparison=False)
                           for i, (year, value) in enumerate((("2025", "1,200"), ("2024", "1,000")))])]


@pytest.mark.equality
def test_what_is_written_is_scored_remembered_and_cut(tokenizer, make_model, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tatqa_dataset_dev.json").write_text(json.dumps(FIGURES))
    make_model(tmp_path / "model")
    config = next(c for c in suites.configs("finance") if c["task"] == "tatqa")
    config["generation_kwargs"]["max_gen_toks"] = 5
    tasks = [benchmarks.load_task(config, Suite(data=[str(tmp_path / "data")]))]
    assert tasks[0].items == ["validation/q0", "validation/q1"] and tasks[0].main_metric == "em"
    from lm_eval.models.huggingface import HFLM
    theirs = benchmarks.ask(HFLM(pretrained=load_model(tmp_path / "model", "fp32"), tokenizer=tokenizer, batch_size=1), tasks)["tatqa"]
    for _ in range(2):
        variant = Variant("v", tmp_path / "model", "fp32", tokenizer, Answers(tmp_path / "answers"))
        rows = pd.DataFrame(run_suite(variant, "finance", tasks, 7, tmp_path))
        kept = [json.loads(line) for line in samples_file(tmp_path, "v", "tatqa").read_text().splitlines()]
        assert [s["answer"] for s in kept] == [s["answer"] for s in theirs] and list(rows["metric"]) == ["em", "f1"]
    assert "model" not in vars(variant)
    sizes = [len(tokenizer.encode(s["prompt"])) for s in kept]
    longest = max(sizes)
    assert rows["cut"].max() == 0
    for room, cut in ((5, 0), (4, sizes.count(longest)), (-1000, 2)):    # 5 tokens may be written
        short = json.loads((tmp_path / "model" / "config.json").read_text()) | {"max_position_embeddings": max(64, longest + room)}
        (tmp_path / "model" / "config.json").write_text(json.dumps(short))
        variant = Variant("w", tmp_path / "model", "fp32", tokenizer, Answers(tmp_path / f"other{room}"))
        assert run_suite(variant, "finance", tasks, 7, tmp_path)[0]["cut"] == cut


def test_the_same_questions_asked_twice_tell_no_more_than_asked_once():
    right = (np.random.default_rng(1).random(400) < 0.6).astype(float)
    once, twice, other = (benchmarks.mean_of(*v) for v in (([right], [7]), ([right, right], [7, 7]), ([right, right], [7, 8])))
    assert twice["stderr"] == once["stderr"] and (twice["ci_low"], twice["ci_high"]) == (once["ci_low"], once["ci_high"])
    same, apart = ([SimpleNamespace(items=i) for i in two] for two in ((["a", "b"], ["a", "b"]), (["a", "b"], ["a", "c"])))
    assert benchmarks._seeds(same, 7) == [7, 7] and benchmarks._seeds(apart, 7) == [7, 8]
    assert once["stderr"] == pytest.approx(right.std(ddof=1) / 20, rel=0.1) and other["stderr"] < 0.85 * once["stderr"]


def test_a_task_that_lies_in_two_folders_or_has_an_item_twice_is_an_error(tmp_path):
    for at in ("raw", "tagged"):
        (tmp_path / at).mkdir()
        (tmp_path / at / "tatqa_dataset_dev.json").write_text(json.dumps(FIGURES))
    with pytest.raises(UserError, match="tatqa_dataset_dev.json in several folders .*raw, .*tagged.*name under data the one that is meant"):
        load_suite("mine", Suite(tasks=["tatqa"], data=[str(tmp_path)]))
    (tmp_path / "raw" / "tatqa_dataset_dev.json").write_text(json.dumps(FIGURES * 2))
    with pytest.raises(UserError, match="task tatqa has item validation/q0 twice"): load_suite("mine", Suite(tasks=["tatqa"], data=[str(tmp_path / "raw")]))


@pytest.mark.parametrize("change, says", [
    (dict(chat=dict(domain="finnance")), "evaluate.chat.domain: no prompts on finnance; known: finance, medicine, patents"),
    (dict(questions=dict(writer="m")), "evaluate.questions: no corpus is of source patents"),
    (dict(backend="vllm"), "evaluate.backend: vllm is not installed"), (dict(texts=dict(mine="hubris/folder")), "hubris/folder: no such file or folder")])
def test_check_knows_what_the_evaluation_could_not_do(change, says):
    from domain_adapt.params import Evaluate
    from domain_adapt.pipeline import check
    params = load_params(ROOT / "params" / "tiny.yaml")
    wrong = check(params.model_copy(update=dict(evaluate=Evaluate(**params.evaluate.model_dump() | change))))
    assert len(wrong) == 1 and says in wrong[0]


def test_settings_say_what_was_asked(evaluated, tokenizer):
    told = json.loads((evaluated[0] / "settings.json").read_text())
    task = told["suites"]["quick"]["tasks"]["boolq"]
    assert told["dtype"] == "fp32" and task["fewshot"] == 0 and len(told["chat_template"]) == 16 and told["seed"] == 7 and task["version"] == 2.0 and task["items"] == 4
    sample = json.loads(samples_file(evaluated[0], "original", "boolq").read_text().splitlines()[0])
    assert task["first_tokens"] == tokenizer.encode(sample["prompt"])[:8] and task["bos"] == 0
    assert str(ROOT) not in json.dumps(told)


def test_a_merge_with_another_vocabulary_is_an_error(made, tmp_path):
    params, folders = made
    merged = tmp_path / "merge"
    shutil.copytree(folders["merge"], merged)
    file = merged / "slerp-0.5" / "tokenizer.json"
    table = json.loads(file.read_text())
    table["model"]["vocab"]["zzz"] = 319
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match="tokenizer of merge:slerp-0.5 has another vocabulary"): evaluate(params, folders | {"merge": merged}, tmp_path)


def test_a_train_stage_without_exports_is_an_error(made, tmp_path):
    with pytest.raises(UserError, match="holds no step_<n>"): evaluate(made[0], made[1] | {"train": tmp_path}, tmp_path)
