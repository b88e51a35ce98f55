"""Merging beside mergekit-yaml: the quickstart's merges on disk, a sweep in memory, three sharded 1B-parameter models.

As a program, `merging.py RECIPE.json MODELS OUT` makes one merge and prints its seconds and those of its checks."""
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from mergekit.io.tensor_writer import TensorWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from domain_adapt.assets import resolve
from domain_adapt.geometry import Weights
from domain_adapt.merge import Merger, Recipe, check_merged, merge
from domain_adapt.models import get_model, load_model, load_tokenizer
from domain_adapt.params import load_params
from domain_adapt.perplexity import Block, document_blocks, score_blocks
from domain_adapt.recipe import recipes
from domain_adapt.runs import ROOT
from domain_adapt.sources.markdown import to_markdown
from domain_adapt.sources.reading import decode

MODEL, NAMES = "smollm2-135m-instruct", ("original", "base", "cpt")
TINY = Path(__file__).resolve().parent.parent / "tiny" / "make.py"
COMMAND = [sys.executable, "-c", "from mergekit.scripts.run_yaml import main; main()"]


def jittered(folder: Path, source: Path, names: Sequence[str] = NAMES) -> dict[str, Path]:
    "bf16 siblings of a model: itself, and others with a fiftieth of each tensor's deviation as noise."
    for i, name in enumerate(names):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        noise, writer = torch.Generator().manual_seed(i), TensorWriter(str(folder / name))
        for k, t in Weights(source).items():
            change = 0.02 * t.float().std() * torch.randn(t.shape, generator=noise) if i else 0
            writer.save_tensor(k, (t.float() + change).bfloat16())
        writer.finalize()
    return {n: folder / n for n in names}


def part(model: str, **parameters) -> dict:
    return {"model": model, "parameters": parameters}


def over_base(name: str, method: str, weight: float, density: float, seed: int | None = None) -> Recipe:
    "The CPT model's task vector, trimmed, with the rest of the weight on the original's."
    models = [part("cpt", weight=weight, density=density), part("original", weight=round(1 - weight, 6), density=1.0)]
    return Recipe(name, dict(merge_method=method, base_model="base", dtype="bfloat16", models=models), {}, seed)


def of_quickstart(dtype: str) -> list[Recipe]:
    "The merges that params/quickstart.yaml names, the random ones with its seed."
    params = load_params(ROOT / "params" / "quickstart.yaml")
    return [recipes(c, dtype=dtype, seed=params.seed)[0] for c in params.merge.candidates]


def many() -> list[Recipe]:
    "24 merges: five methods, weights and densities."
    made = []
    for w in (0.2, 0.4, 0.6, 0.8):
        parts = [part("original", weight=round(1 - w, 6)), part("cpt", weight=w)]
        made += [Recipe(f"linear-{w}", dict(merge_method="linear", dtype="bfloat16", models=parts), {}),
                 Recipe(f"slerp-{w}", dict(merge_method="slerp", base_model="original", dtype="bfloat16", parameters={"t": w},
                                           models=[{"model": "original"}, {"model": "cpt"}]), {}),
                 Recipe(f"task-{w}", dict(merge_method="task_arithmetic", base_model="base", dtype="bfloat16", models=parts), {})]
    for w in (0.4, 0.7):
        for d in (0.2, 0.5, 0.8):
            made += [over_base(f"ties-{w}-{d}", "ties", w, d), over_base(f"dare-{w}-{d}", "dare_ties", w, d, seed=1)]
    return made


def written(recipe: Recipe, beside: Path, out: str = "theirs") -> list[str]:
    "The configuration as a file beside folders of the models' names; what follows `mergekit-yaml`."
    (beside / f"{recipe.name}.yml").write_text(yaml.safe_dump(recipe.config))
    seed = [] if recipe.seed is None else ["--random-seed", str(recipe.seed)]
    return [f"{recipe.name}.yml", out, "--quiet", "--no-write-model-card", *seed]


def seconds(f: Callable) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def mergekit_yaml(recipe: Recipe, beside: Path, out: str = "theirs") -> float:
    "Seconds of the command."
    words = [*COMMAND, *written(recipe, beside, out)]
    return seconds(lambda: subprocess.run(words, cwd=beside, check=True, capture_output=True))


def load_into(model: torch.nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors: held[name].copy_(tensor)


def sweep(folder: Path, small: bool) -> dict:
    """The mean candidate of the sweep, ready to be scored, made in memory; against mergekit-yaml's process and loading its output,
    measured once for each method (the others differ in numbers only)."""
    tried, models = many()[:4 if small else None], jittered(folder, get_model(MODEL))
    model, merger, ours = load_model(models["original"], "bf16"), Merger(models), {}
    for recipe in tried: ours[recipe.name] = seconds(lambda: load_into(model, merger.tensors(recipe)))
    method = lambda r: r.config["merge_method"]
    load = lambda: AutoModelForCausalLM.from_pretrained(folder / "theirs", dtype=torch.bfloat16)
    once = {m: mergekit_yaml(r, folder) + seconds(load) for m, r in {method(r): r for r in tried}.items()}
    return dict(ours=statistics.mean(ours.values()), theirs=statistics.mean(once[method(r)] for r in tried), rounds=1,
                note=f"all {len(tried)} {sum(ours.values()):.0f} s; slowest {max(ours, key=ours.get)} {max(ours.values()):.1f} s (sorts)")


def read(model, windows: list[dict]) -> float:
    "Nats of windows of text by plain transformers."
    total = 0.0
    with torch.inference_mode():
        for w in windows:
            ids = torch.tensor([[*w["context"], *w["ids"]]])
            logits = model(ids[:, :-1]).logits[0, -len(w["ids"]):].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, -len(w["ids"]):], reduction="sum").item()
    return total


def scored(folder: Path, small: bool) -> dict:
    "A candidate of the sweep made and scored on a 10-K, against mergekit-yaml, loading and plain transformers; one of two methods each."
    tokens, models = 1024 if small else 24576, jittered(folder, get_model(MODEL))
    page = decode(sorted(resolve("package:filings-10k").glob("*.html"))[0].read_bytes())
    windows = document_blocks(to_markdown(page).text, load_tokenizer(models["original"]), 512)[:tokens // 512]
    blocks = [Block("sec", "domain", "d", w["block"], w["context"], w["ids"], w["bytes"], w["words"]) for w in windows]
    model, merger, took, found = load_model(models["original"], "bf16"), Merger(models), {"ours": [], "theirs": []}, []
    for recipe in [r for r in many() if r.name in ("linear-0.4", "ties-0.4-0.5")]:
        def ours() -> None:
            load_into(model, merger.tensors(recipe))
            found.append(score_blocks(model, blocks, recipe.name)["nll"].sum())

        def theirs() -> None:
            mergekit_yaml(recipe, folder)
            found.append(read(AutoModelForCausalLM.from_pretrained(folder / "theirs", dtype=torch.bfloat16), windows))
        for name, f in (("ours", ours), ("theirs", theirs)): took[name].append(seconds(f))
    return dict(ours=statistics.mean(took["ours"]), theirs=statistics.mean(took["theirs"]), rounds=1,
                note=f"{sum(len(b.ids) for b in blocks):,} tokens; nats apart by {max(abs(a / b - 1) for a, b in zip(found[::2], found[1::2])):.1e}")


MERGES = """import sys
from pathlib import Path
from merging import NAMES, merge, of_quickstart
folder, names = Path(sys.argv[1]), sys.argv[2:]
for r in of_quickstart("bfloat16"):
    if r.name in names: merge(r, {n: folder / n for n in NAMES}, folder / f"ours-{r.name}")"""


def same(one: Path, other: Path) -> bool:
    "Whether two models have the same tensors, bit for bit."
    x, y = (load_file(f / "model.safetensors") for f in (one, other))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def merges(folder: Path, small: bool) -> dict:
    "The quickstart's merges to checked folders by a process of ours, against mergekit-yaml for each; the same files."
    jittered(folder, get_model(MODEL))
    tried, rounds = of_quickstart("bfloat16")[:2 if small else None], 1 if small else 2
    words = [sys.executable, "-W", "ignore", "-c", MERGES, folder, *(r.name for r in tried)]
    ours = lambda: seconds(lambda: subprocess.run(words, cwd=Path(__file__).parent, check=True, capture_output=True))
    theirs = lambda: sum(mergekit_yaml(r, folder, f"theirs-{r.name}") for r in tried)
    took = {ours: [], theirs: []}
    for i in range(rounds):
        for f in list(took)[::-1 if i % 2 else 1]: took[f].append(f())
    for r in tried: assert same(folder / f"ours-{r.name}", folder / f"theirs-{r.name}"), r.name
    return dict(ours=statistics.median(took[ours]), theirs=statistics.median(took[theirs]), rounds=rounds,
                note="the same bits; ours are checked too")


def billions(folder: Path) -> dict[str, Path]:
    "Three random 1.1B-parameter bf16 Llamas in shards of 500 MB, with a tokenizer."
    spec = importlib.util.spec_from_file_location("make_tiny", TINY)
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, dtype="bfloat16",
                         num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False,
                         architectures=["LlamaForCausalLM"])
    with torch.device("meta"): shapes = {k: p.shape for k, p in LlamaForCausalLM(config).named_parameters()}
    for i, name in enumerate(NAMES):
        made.model(folder / name)
        (folder / name / "model.safetensors").unlink()
        config.save_pretrained(folder / name)
        writer = TensorWriter(str(folder / name), max_shard_size=500_000_000)
        for j, (k, shape) in enumerate(shapes.items()):
            t = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(j))
            if i: t.add_(torch.empty_like(t).normal_(0, 0.001, generator=torch.Generator().manual_seed(1000 * i + j)))
            writer.save_tensor(k, t)
        writer.finalize()
    for f in folder.rglob("*.safetensors"): synced(f)
    return {n: folder / n for n in NAMES}


def synced(file: Path, forget: bool = True) -> None:
    "Put a file on the disk, and out of memory."
    with file.open("rb") as f:
        os.fsync(f.fileno())
        if forget: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(models: dict[str, Path], out: Path, block: int = 1 << 23) -> float:
    "Seconds to read all the models' weights in plain blocks and to write as much as one of them, synced."
    start = time.perf_counter()
    with out.open("wb") as o:
        for name, folder in models.items():
            for file in sorted(folder.glob("*.safetensors")):
                with file.open("rb", buffering=0) as f:
                    while b := f.read(block):
                        if name == "original": o.write(b)
        o.flush()
        os.fsync(o.fileno())
    took = time.perf_counter() - start
    out.unlink()
    return took


def watched(words: list) -> tuple[str, float, float]:
    "What a program prints, and its peaks in GB: resident memory, and the part of it that is not a file's."
    job = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    while job.poll() is None:
        for line in Path(f"/proc/{job.pid}/status").read_text().splitlines():
            if (k := line.split(":")[0]) in peaks: peaks[k] = max(peaks[k], int(line.split()[1]))
        time.sleep(0.02)
    assert job.returncode == 0, job.returncode
    return job.stdout.read(), peaks["VmHWM"] / 2**20, peaks["RssAnon"] / 2**20


def large(folder: Path, small: bool, method: str) -> dict:
    "A merge of three 1B-parameter models from a cold disk, against reading them and writing as much as one."
    models = jittered(folder, get_model(MODEL)) if small else billions(folder)
    parts = [part(n, weight=w) for n, w in zip(NAMES, (0.5, 0.2, 0.3))]
    linear = Recipe("linear", dict(merge_method="linear", dtype="bfloat16", models=parts), {})
    recipe = linear if method == "linear" else over_base("ties", method, 0.6, 0.5)
    def cold() -> None:
        for f in folder.rglob("*.safetensors"): synced(f)
    (folder / "recipe.json").write_text(json.dumps([recipe.name, recipe.config, recipe.seed]))
    cold()
    plain = plain_copy(models, folder / "plain")
    cold()
    said, resident, anonymous = watched([sys.executable, __file__, folder / "recipe.json", folder, folder / "ours"])
    took, checked = map(float, said.split())
    size = sum(f.stat().st_size for m in models.values() for f in m.glob("*.safetensors")) * 4 / 3 / 1e9
    return dict(ours=took, theirs=plain, rounds=1, note=f"{size / took:.2f} GB/s read and written; {checked:.0f} s of it for the checks; "
                f"peak memory {resident:.2f} GB, {anonymous:.2f} of it anonymous")


if __name__ == "__main__":
    (name, config, seed), out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[3])
    models = {n: Path(sys.argv[2]) / n for n in NAMES}
    took = seconds(lambda: merge(Recipe(name, config, {}, seed), models, out))
    print(took, seconds(lambda: check_merged(out, models["original"], config["dtype"], models.values())))
