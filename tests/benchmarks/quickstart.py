"""The whole quickstart by one command of ours, and by hand: by_hand.py, mergekit-yaml and lm_eval in a row.

By hand the same number of tokens is trained on in the same steps and saved as often, the same merges are made, as many tokens are read by as
many models, and as many models are asked the same benchmarks; each is asserted. Each side is a process after another, from raw files."""
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import yaml
from merging import mergekit_yaml, seconds

from domain_adapt import suites
from domain_adapt.assets import resolve
from domain_adapt.benchmarks import load_suite
from domain_adapt.models import best_dtype, get_model, usable_cores
from domain_adapt.params import Params, load_params
from domain_adapt.recipe import recipes
from domain_adapt.runs import ROOT, write_json
from domain_adapt.train import export_steps

sys.path.append(str(Path(__file__).resolve().parent.parent))
from harness import lm_eval, scored, write_task

PARAMS = ROOT / "params" / "quickstart.yaml"
SMALL = ("train.steps=2", "train.warmup=1", "train.validation={every: 2, tokens: 512}", "merge.max_tokens=3072", "evaluate.chat.max_tokens=4",
         "merge.candidates=[{name: linear-0.5, method: linear, weight: 0.5}, {name: ties, method: ties, weight: 0.7, density: 0.5}]",
         "evaluate.perplexity.max_tokens=2048", "evaluate.suites.quick.limit=2")


def ours(folder: Path, sets: tuple[str, ...]) -> dict:
    "The command, with nothing remembered."
    words = [sys.executable, "-m", "domain_adapt.cli", "run", PARAMS, *(w for s in sets for w in ("--set", s))]
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    env = os.environ | dict(DOMAIN_ADAPT_OUTPUTS=str(folder / "outputs"), PYTHONPATH=str(ROOT))
    with open(folder / "ours.log", "w") as log: took = seconds(lambda: subprocess.run(words, cwd=ROOT, env=env, stdout=log, stderr=log, check=True))
    stages = json.loads((folder / "outputs" / "quickstart" / "manifest.json").read_text())["stages"]
    return dict(whole=took, parts={n: s["seconds"] for n, s in stages.items()})


def windows(run: Path, params: Params) -> dict[str, dict[str, int]]:
    "How many tokens of each corpus a model of ours was read, where candidates were chosen among and where that was confirmed."
    tried = pd.read_csv(run / "4_merge" / "blocks.csv").query("variant == 'original'")
    half = pd.read_csv(run / "5_evaluate" / "blocks.csv").query("variant == 'original' and half == 'report'")
    return {"select": tried.groupby("corpus")["tokens"].sum().to_dict(), "report": half.groupby("corpus")["tokens"].sum().to_dict()}


def job(folder: Path, run: Path, params: Params) -> dict:
    "What by_hand.py is to do: the quickstart's settings."
    t, at = params.train, {n: str(resolve(c.path)) for n, c in params.corpora.items()}
    every = export_steps(params)[0]
    assert [every, 2 * every] == export_steps(params)
    made = dict(out=str(folder), filings=at["sec"], wikipedia=at["wikipedia"], news=at["news"], model=str(get_model(params.model)),
                processes=params.ingest.workers, replay=params.tokens.replay, sequence_length=params.tokens.sequence_length, save_every=every,
                validate_every=t.validation.every, validation_tokens=t.validation.tokens, bf16=best_dtype(t.precision) == "bf16",
                dtype=best_dtype(params.evaluate.precision), block=params.evaluate.perplexity.block, windows=windows(run, params))
    return made | {k: getattr(t, k) for k in ("steps", "global_batch", "micro_batch", "lr", "min_lr", "warmup", "weight_decay", "clip_grad")}


def chosen(rows: list[dict], names: list[str], most: float, number: int) -> list[str]:
    "By the quickstart's rule, simply: of the merges that forget at most so much, those that read the domain best."
    bits = {(r["model"], r["corpus"]): r["nats"] / r["bytes"] / math.log(2) for r in rows}
    general = lambda n: (bits[n, "wikipedia"] + bits[n, "news"]) / 2
    keeps = [n for n in names if general(n) <= general("original") + most] or names
    return sorted(keeps, key=lambda n: bits[n, "sec"])[:number]


def by_hand(folder: Path, run: Path, params: Params) -> dict:
    "Everything from the same raw files; what a user has ready, as lm-eval's task files, is not counted."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    asked, model, took = job(folder, run, params), get_model(params.model), {}
    write_json(folder / "job.json", asked)
    suite = load_suite("quick", params.evaluate.suites["quick"])
    configs = {c["task"]: c for c in suites.configs("quick")}
    tasks = [write_task(folder / "tasks", configs[t.name], t) for t in suite]
    merges = [recipes(c, dtype="float32", seed=params.seed)[0] for c in params.merge.candidates]

    def program(what: str, *more: str) -> float:
        words = [sys.executable, "-W", "ignore", Path(__file__).with_name("by_hand.py"), what, folder / "job.json", *more]
        env = os.environ | dict(OMP_NUM_THREADS=str(usable_cores()))
        with open(folder / f"{what}.log", "a") as log: return seconds(lambda: subprocess.run(words, env=env, stdout=log, stderr=log, check=True))
    took["train"] = program("train")
    middle, last = (f"trained/checkpoint-{n}" for n in export_steps(params))
    for name, at in (("original", model), ("cpt", folder / last), ("cpt@", folder / middle)): (folder / name).symlink_to(at)
    took["merge"] = sum(mergekit_yaml(r, folder, r.name) for r in merges)
    names = [r.name for r in merges]
    took["perplexity"] = program("perplexity", "select", "original", "cpt@", "cpt", *names)
    kept = len(json.loads((run / "4_merge" / "selection.json").read_text())["kept"])
    best = chosen(json.loads((folder / "perplexity-select.json").read_text()), names, params.merge.select.max_forgetting, kept)
    took["perplexity"] += program("perplexity", "report", "original", "cpt@", "cpt", *best)
    took["evaluate"] = sum(seconds(lambda v=v: lm_eval(folder / v, asked["dtype"], folder / "tasks", tasks, folder / f"lm_eval-{v}"))
                           for v in ("original", "cpt", *best))
    return dict(whole=sum(took.values()), parts=took, best=best)


def check_same_work(run: Path, theirs: Path, params: Params, best: list[str]) -> dict[str, float]:
    "Raise `AssertionError` unless both sides trained, merged, read and asked as much; gives the mean losses and how far accuracies are apart."
    steps = pd.read_json(run / "3_train" / "metrics.jsonl", lines=True).query("step > 0")
    trained = json.loads((theirs / "trained.json").read_text())
    whole = params.train.steps * params.train.global_batch * params.tokens.sequence_length
    assert (len(steps), steps["tokens"].iloc[-1]) == (trained["steps"], trained["tokens"]) == (params.train.steps, whole)
    made = {f.stem for f in theirs.glob("*.yml") if any((theirs / f.stem).glob("*.safetensors"))}
    assert made == set(pd.read_csv(run / "4_merge" / "sweep.csv")["name"]) - {"original", "cpt"}, made
    for kept in (run / "4_merge").glob("*/mergekit_config.yml"):
        assert yaml.safe_load(kept.read_text()) == yaml.safe_load((theirs / f"{kept.parent.name}.yml").read_text()), kept
    for half, blocks in (("select", "4_merge"), ("report", "5_evaluate")):
        read = pd.DataFrame(json.loads((theirs / f"perplexity-{half}.json").read_text()))
        mine = pd.read_csv(run / blocks / "blocks.csv").query("half == @half")
        each = {*read.groupby("model")["tokens"].sum(), *mine.groupby("variant")["tokens"].sum()}
        assert len(each) == 1, each
        if half == "report": assert read["model"].nunique() == mine["variant"].nunique()
    scores = pd.read_csv(run / "5_evaluate" / "benchmarks.csv")
    assert scores["variant"].nunique() == 2 + len(best)
    for v in ("original", "cpt", *best):
        found = scored(theirs / f"lm_eval-{v}")
        assert set(found) == set(scores["task"]) and {r["sample_len"] for r in found.values()} == set(scores["n"]), v
    found = scored(theirs / "lm_eval-original")
    apart = max(abs(r.value - found[r.task][r.metric]) for r in scores.query("variant == 'original'").itertuples())
    return dict(ours=steps["loss"].mean(), theirs=trained["loss"], apart=apart)


def arm(file: Path, work: Callable[[], dict]) -> dict:
    "What a side found, remembered."
    if not file.exists(): write_json(file, work())
    return json.loads(file.read_text())


def quickstart(folder: Path, small: bool) -> dict:
    "Once each; a side that is done is not done again after a stop."
    sets = SMALL if small else ()
    params, run, theirs = load_params(PARAMS, sets), folder / "outputs" / "quickstart", folder / "theirs"
    get_model(params.model)
    for asset in ("filings-10k", "wikipedia", "news", "benchmarks"): resolve(f"package:{asset}")
    mine, hand = arm(folder / "ours.json", lambda: ours(folder, sets)), arm(folder / "theirs.json", lambda: by_hand(theirs, run, params))
    for side, took in (("ours", mine), ("by hand", hand)):
        print(f"{side}: {took['whole']:.0f} s;", ", ".join(f"{k} {v:.0f}" for k, v in took["parts"].items()))
    found = check_same_work(run, theirs, params, hand["best"])
    return dict(ours=mine["whole"], theirs=hand["whole"], rounds=1,
                note=f"ours also filters, repeats the random merge, chats, looks for leaks, gives intervals and verdicts, writes the report; "
                     f"mean training loss {found['ours']:.2f}, {found['theirs']:.2f} on trafilatura's text; "
                     f"the original's accuracies at most {found['apart']:.2f} apart")
