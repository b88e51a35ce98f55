"Prompts, scores and the evaluate stage against lm-eval's own tasks and model."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain_adapt import benchmarks, suites
from domain_adapt.benchmarks import SharedContext, evaluate, evenly, load_suite, read_blocks, reads_trees, run_suite, samples_file, shares
from domain_adapt.models import load_model, load_tokenizer
from domain_adapt.params import Suite, UserError, load_params
from domain_adapt.perplexity import heldout_blocks, score_blocks
from domain_adapt.runs import PACKAGE, ROOT, write_csv, write_json

ITEMS = ROOT / "tests" / "tiny" / "benchmarks"
BENCHMARKS = "variant,suite,task,metric,value,stderr,ci_low,ci_high,n,fewshot,chat_template,dtype,seed".split(",")
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
    model = tiny(kind)
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


def test_a_score_does_not_depend_on_the_batch(suite, tokenizer, tiny_llama, monkeypatch):
    model, found = load_model(tiny_llama, "fp32"), []
    for size in (1, 200, 4096):
        monkeypatch.setattr(SharedContext, "tokens", size)
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
    for kind in ("arrow", "parquet", "jsonl"): assert list(suites.read_items(tmp_path / kind)) == rows


@pytest.mark.parametrize("name, suite, message", [
    ("quack", Suite(), "evaluate.suites.quack: no such suite; known: quick"),
    ("quick", Suite(data="tests/tiny/filings"), "holds no benchmark items"),
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
    model = load_model(tiny_llama, "fp32")
    rows = pd.DataFrame(run_suite(model, tokenizer, "merge:a", "quick", suite, 7, tmp_path))
    run_suite(model, tokenizer, "again", "quick", suite, 7, tmp_path)
    assert list(rows) == BENCHMARKS and ((rows["ci_low"] <= rows["value"]) & (rows["value"] <= rows["ci_high"])).all()
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
    params = load_params(ROOT / "params" / "tiny.yaml", ("evaluate.perplexity.max_tokens=3000",))
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
    real = benchmarks.score_blocks
    def counted(model, blocks, variant): scored[variant] = len(blocks); return real(model, blocks, variant)
    benchmarks.score_blocks = counted
    try: evaluate(*made, out)
    finally: benchmarks.score_blocks = real
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
    assert sorted(f.name for f in (out / "samples").iterdir()) == ["cpt", "merge:slerp-0.5", "original"]


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
def test_two_runs_write_the_same_files(evaluated, made, tmp_path):
    evaluate(*made, tmp_path)
    files = sorted(f.relative_to(tmp_path) for f in tmp_path.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(evaluated[0]) for f in evaluated[0].rglob("*") if f.is_file()) and len(files) == 5 + 3 * 5
    for f in files: assert (tmp_path / f).read_bytes() == (evaluated[0] / f).read_bytes(), f


def test_comparisons_look_at_the_half_nothing_was_chosen_on(evaluated):
    compared, table = (pd.read_csv(evaluated[0] / f"{n}.csv") for n in ("comparisons", "perplexity"))
    bits = table[table["half"] == "report"].set_index(["variant", "corpus"])["bits_per_byte"]
    for r in compared[compared["measure"].str.startswith("bits_per_byte/")].itertuples():
        corpus = r.measure.split("/")[1]
        assert r.difference == pytest.approx(bits[r.variant, corpus] - bits[r.against, corpus], abs=1e-9)


def test_settings_say_what_was_asked(evaluated, tokenizer):
    told = json.loads((evaluated[0] / "settings.json").read_text())
    task = told["suites"]["quick"]["tasks"]["boolq"]
    assert told["dtype"] == "fp32" and told["fewshot"] == 0 and told["seed"] == 7 and task["version"] == 2.0 and task["items"] == 4
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
