"lm-eval's command on the items that we ask: its task files, the call, and what it wrote."
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from domain_adapt.benchmarks import Task
from domain_adapt.runs import ROOT

SCORING = """from domain_adapt.finance import SCORERS

def score(item, answers): return SCORERS[{scorer!r}](item, answers[0])
"""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def write_task(folder: Path, config: dict, task: Task) -> str:
    "Write our task file as one of lm-eval's, with the items as a JSON file beside it; its name there."
    folder.mkdir(parents=True, exist_ok=True)
    name, files = f"same_{task.name}", {}
    for split, items in task.task.dataset.items():
        files[split] = str(folder / f"{name}_{split}.json")
        items.to_json(files[split])
    shown = dict(num_fewshot=task.task.config.num_fewshot or 0) | ({"fewshot_split": "fewshot"} if "fewshot" in files else {})
    config = config | shown | dict(task=name, dataset_path="json", dataset_kwargs={"data_files": files})
    scorer = config["metadata"].get("scorer")
    text = yaml.safe_dump(config | {"metadata": {"version": config["metadata"]["version"]}}, allow_unicode=True)
    if scorer:
        (folder / f"score_{scorer}.py").write_text(SCORING.format(scorer=scorer))
        text += f"process_results: !function score_{scorer}.score\n"
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name


def write_texts(folder: Path, texts: Sequence[str]) -> str:
    "Write a task like lm-eval's wikitext, that reads these texts as they are; its name."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.json").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "texts.yaml").write_text(yaml.safe_dump(dict(
        task="texts", dataset_path="json", dataset_kwargs={"data_files": {"items": str(folder / "texts.json")}}, test_split="items",
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[dict(metric=m) for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")])))
    return "texts"


def lm_eval(model: Path, dtype: str, tasks: Path, names: Sequence[str], out: Path, *more: str) -> None:
    "Run the command. Raises with what it said where it fails."
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype={DTYPES[dtype]}",
             "--device", "cpu", "--batch_size", "8", "--tasks", ",".join(names), "--include_path", str(tasks), "--log_samples",
             "--output_path", str(out), *more]
    offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tasks / "cache"), PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(words, env=os.environ | offline, text=True, capture_output=True)
    if done.returncode: raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])


def scored(out: Path) -> dict[str, dict[str, float]]:
    "What the command found: metrics, their standard errors under <metric>_stderr, by task."
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    return {t.removeprefix("same_"): {k.removesuffix(",none"): v for k, v in found.items()} for t, found in results.items()}


def samples(out: Path, task: str) -> list[dict]:
    "The command's answered items of a task, in order, as ours are kept."
    found = []
    for line in next(out.rglob(f"samples_same_{task}_*.jsonl")).read_text(encoding="utf-8").splitlines():
        s = json.loads(line)
        asked, answers = list(s["arguments"].values()), [a for a, in s["resps"]]
        kept = {"order": s["doc_id"], "prompt": asked[0]["arg_0"], **{m: s[m] for m in s["metrics"]}}
        if isinstance(answers[0], str): kept |= dict(answer=answers[0])
        else: kept |= dict(choices=[a["arg_1"] for a in asked], loglikelihoods=[float(n) for n, _ in answers],
                           greedy=[g == "True" for _, g in answers])
        found.append(kept)
    return sorted(found, key=lambda s: s.pop("order"))
