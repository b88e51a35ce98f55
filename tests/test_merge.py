"""Merges against the formulae in plain torch, against mergekit's command, and under damage."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import yaml
from mergekit import graph as merging
from mergekit.io.tensor_writer import TensorWriter
from safetensors.torch import load_file, save_file

from domain_adapt.checks import check_merged, common_dtype, rendered
from domain_adapt.geometry import Weights
from domain_adapt.merge import Merger, merge
from domain_adapt.params import Candidate, UserError
from domain_adapt.recipe import Recipe, recipes

CANDIDATES = {c.name: c for c in (
    Candidate(name="linear", method="linear", weight=0.3), Candidate(name="slerp", method="slerp", t=0.4),
    Candidate(name="ties", method="ties", weight=0.7, density=0.3),
    Candidate(name="dare", method="dare_ties", weight=0.7, density=0.6, seeds=[5]))}


def only(candidate, **how): return recipes(candidate, **how)[0]


def altered(source, to, change):
    "A copy of a model folder with every tensor changed."
    shutil.copytree(source, to)
    file = to / "model.safetensors"
    save_file({k: change(k, t).contiguous() for k, t in load_file(file).items()}, file)
    return to


def jitter(seed, size):
    g = torch.Generator().manual_seed(seed)
    return lambda k, t: t + size * torch.randn(t.shape, generator=g)


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, tiny_llama):
    "original; its near (SLERP is linear) and farther (an arc) neighbours; far, unrelated; base, the sibling."
    at = tmp_path_factory.mktemp("siblings")
    make_model(at / "far", seed=9)
    return {"original": tiny_llama, "far": at / "far",
            "cpt": altered(tiny_llama, at / "cpt", jitter(1, 0.002)),
            "near": altered(tiny_llama, at / "near", jitter(3, 0.0002)),
            "base": altered(tiny_llama, at / "base", jitter(2, 0.002))}


def trim(delta, density):
    "The `density` largest entries by magnitude, per tensor."
    keep = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).indices
    return delta * torch.zeros(delta.numel()).index_fill(0, keep, 1).view_as(delta)


def slerp(a, b, t):
    t = torch.tensor(t)
    cos = ((a / a.norm()) * (b / b.norm())).sum().clamp(-1, 1)
    if cos.abs() > 0.9995: return (1 - t) * a + t * b
    angle = torch.acos(cos)
    return torch.sin((1 - t) * angle) / torch.sin(angle) * a + torch.sin(t * angle) / torch.sin(angle) * b


def elect(weighted, weights, normalize):
    "TIES: the sum of the weighted task vectors where their signs agree with the sum's."
    sign = torch.where(sum(weighted) >= 0, 1, -1)
    agree = [d.sign() == sign for d in weighted]
    total = sum(d * m for d, m in zip(weighted, agree))
    weight = sum(w * m for w, m in zip(weights, agree))
    return total / torch.where(weight == 0, 1, weight) if normalize else total


def check(out, formula):
    "Every tensor of the merge is the formula's, to the bit."
    merged = Weights(out)
    assert merged and not [k for k in merged if not torch.equal(merged[k], formula(k))]


@pytest.mark.oracle
@pytest.mark.equality
class TestFormulae:
    def test_linear(self, models, tmp_path):
        merge(only(CANDIDATES["linear"]), models, tmp_path / "m")
        a, b, w = Weights(models["original"]), Weights(models["cpt"]), torch.tensor([0.7, 0.3])
        check(tmp_path / "m", lambda k: (a[k] * w[0]).addcmul(b[k], w[1]) / w.sum())

    @pytest.mark.parametrize("other, arcs", [("near", False), ("cpt", True), ("far", True)])
    def test_slerp(self, models, tmp_path, other, arcs):
        merge(only(CANDIDATES["slerp"]), models | {"cpt": models[other]}, tmp_path / "m")
        a, b = Weights(models["original"]), Weights(models[other])
        matrices = [k for k in a if a[k].dim() == 2]
        cosines = [torch.cosine_similarity(a[k].flatten(), b[k].flatten(), 0) for k in matrices]
        assert all((c.abs() <= 0.9995) == arcs for c in cosines)
        check(tmp_path / "m", lambda k: slerp(a[k].flatten(), b[k].flatten(), 0.4).view_as(a[k]))

    def test_ties(self, models, tmp_path):
        merge(only(CANDIDATES["ties"]), models, tmp_path / "m")
        a, b = Weights(models["original"]), Weights(models["cpt"])
        check(tmp_path / "m", lambda k: a[k] + 0.7 * trim(b[k] - a[k], 0.3))

    @pytest.mark.parametrize("normalize", [None, False])
    def test_ties_over_the_sibling_merges_two_task_vectors(self, models, tmp_path, normalize):
        candidate = CANDIDATES["ties"].model_copy(update={"normalize": normalize})
        merge(only(candidate, sibling=True), models, tmp_path / "m")
        base, a, b = (Weights(models[n]) for n in ("base", "original", "cpt"))
        w = torch.tensor([0.7, 0.3])
        check(tmp_path / "m", lambda k: base[k] + elect(
            [w[0] * trim(b[k] - base[k], 0.3), w[1] * (a[k] - base[k])], w, normalize is None))

    def test_dare_under_the_same_mask(self, models, tmp_path):
        merge(only(CANDIDATES["dare"]), models, tmp_path / "m")
        a, b = Weights(models["original"]), Weights(models["cpt"])
        torch.manual_seed(5)
        masks = {k: torch.bernoulli(torch.full_like(a[k], 0.6)) for k in sorted(a)}

        def formula(k):
            delta, kept = b[k] - a[k], (b[k] - a[k]) * masks[k]
            return a[k] + 0.7 * (kept * (delta.abs().sum() / kept.abs().sum()))
        check(tmp_path / "m", formula)


def part(model, **parameters): return {"model": model, "parameters": parameters}


LISTING = dict(merge_method="ties", base_model="base", parameters=dict(normalize=True, int8_mask=True), models=[
    part("cpt", weight=[dict(filter="mlp", value=[.25, .5, .5, .25]), dict(value=[.25, .5, .5, .25])], density=.75),
    part("original", weight=[dict(filter="mlp", value=[.75, .5, .5, .75]), dict(value=[.75, .5, .5, .75])], density=1.0)])
TWO = [part("cpt", weight=.6, density=.4), part("original", weight=.4, density=.7)]
BOTH = [{"model": "original"}, {"model": "cpt"}]
HALVES = [{"sources": [{"model": m, "layer_range": layers}]} for m, layers in [("original", [0, 1]), ("cpt", [1, 3])]]
VERBATIM = {r.name: r for r in (
    Recipe("listing1", LISTING, {}),
    Recipe("ties", LISTING | dict(models=TWO), {}),
    Recipe("ties-thin", LISTING | dict(models=[part("cpt", weight=.6, density=.1), part("original", weight=.4, density=.3)]), {}),
    Recipe("ties-rescaled", dict(merge_method="ties", base_model="base", parameters=dict(rescale=True), models=TWO), {}),
    Recipe("linear", dict(merge_method="linear", models=[part(m, weight=w) for m, w in [("original", .3), ("cpt", .5), ("base", .2)]]), {}),
    Recipe("slerp", dict(merge_method="slerp", base_model="original", parameters=dict(t=[.2, .8]), models=BOTH), {}),
    Recipe("task_arithmetic", dict(merge_method="task_arithmetic", base_model="base", models=TWO), {}),
    Recipe("dare_ties", dict(merge_method="dare_ties", base_model="base", models=TWO), {}, seed=5),
    Recipe("dare_linear", dict(merge_method="dare_linear", base_model="base", models=TWO), {}, seed=6),
    Recipe("della", dict(merge_method="della", base_model="base", models=TWO), {}, seed=7),
    Recipe("breadcrumbs", dict(merge_method="breadcrumbs", base_model="base", models=TWO), {}),
    Recipe("halves", dict(merge_method="passthrough", slices=HALVES), {}),
    Recipe("slices", dict(merge_method="ties", base_model="base", slices=[
        {"sources": [s | {"layer_range": r} for s in [*TWO, part("base")]]} for r in ([0, 2], [2, 3])]), {}))}
RECIPES = [f"{dtype}-{name}" for dtype in ("bf16", "fp32", "untied") for name in VERBATIM] + ["narrowed-ties", "narrowed-linear"]
KINDS = {"bf16": dict(dtype="bfloat16"), "fp32": dict(dtype="float32"), "untied": dict(dtype="bfloat16"),
         "narrowed": dict(dtype="float32", out_dtype="bfloat16")}
ALL_JOBS = """
import json, os, sys
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main
for folder, words in json.loads(sys.argv[1]):
    os.chdir(folder)
    LoaderCache.loaders.clear()
    main(words, standalone_mode=False)
"""


def asked(job):
    "The recipe of a job's name, with the dtypes of its models."
    kind, name = job.split("-", 1)
    return kind, replace(VERBATIM[name], config=VERBATIM[name].config | KINDS[kind])


def siblings(at, source, dtype, untied):
    "original, base and cpt, near each other; untied ones have heads of their own and lie in many shards."
    for i, name in enumerate(("original", "base", "cpt")):
        shutil.copytree(source, at / name)
        weights, shake = load_file(source / "model.safetensors"), jitter(i, 0.002 if i else 0)
        (at / name / "model.safetensors").unlink()
        if untied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
            config = json.loads((source / "config.json").read_text())
            (at / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        writer = TensorWriter(str(at / name), max_shard_size=30_000 if untied else 10**9)
        for k, t in weights.items(): writer.save_tensor(k, shake(k, t).to(dtype))
        writer.finalize()
    return {n: at / n for n in ("original", "base", "cpt")}


def everything(folder):
    "All tensors of a folder's files, also those that `Weights` derives."
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def identical(found, wanted):
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)
    assert wanted and found.keys() == wanted.keys() and not [k for k in wanted if not same(found[k], wanted[k])]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, make_model):
    "What mergekit-yaml's entry point makes of all recipes, in one process, where folders of the models' names stand."
    at, jobs = tmp_path_factory.mktemp("theirs"), []
    make_model(at / "source", hidden=64, layers=3)
    kinds = {"bf16": (torch.bfloat16, False), "fp32": (torch.float32, False), "untied": (torch.bfloat16, True)}
    models = {k: siblings(at / k, at / "source", *how) for k, how in kinds.items()}
    models["narrowed"] = models["fp32"]
    for job in RECIPES:
        kind, recipe = asked(job)
        folder = models[kind]["original"].parent
        (folder / f"{job}.yml").write_text(recipe.yaml)
        seed = re.findall(r"--random-seed \d+", recipe.yaml)
        jobs.append([str(folder), [f"{job}.yml", job, "--quiet", "--no-write-model-card", *" ".join(seed).split()]])
    done = subprocess.run([sys.executable, "-c", ALL_JOBS, json.dumps(jobs)], text=True, capture_output=True,
                          env=os.environ | {"PYTHONHASHSEED": "123"})
    assert not done.returncode, done.stderr
    return models


@pytest.fixture(scope="module")
def mergers(theirs): return {k: Merger(models) for k, models in theirs.items()}


@pytest.mark.oracle
class TestMergekitsOwn:
    def test_the_task_vectors_tie(self, theirs):
        a, b = (Weights(theirs["bf16"][n])["model.embed_tokens.weight"] for n in ("base", "cpt"))
        assert len((a - b).unique()) < a.numel() / 10

    @pytest.mark.parametrize("job", RECIPES)
    def test_in_memory(self, theirs, mergers, job):
        kind, recipe = asked(job)
        wanted = everything(theirs[kind]["original"].parent / job)
        identical(dict(mergers[kind].tensors(recipe)), wanted)

    @pytest.mark.parametrize("job", [j for j in RECIPES if j.split("-", 1)[1] in ("listing1", "slerp", "dare_ties", "halves", "ties")])
    def test_on_disk(self, theirs, tmp_path, monkeypatch, job):
        kind, recipe = asked(job)
        monkeypatch.setattr("domain_adapt.merge.SHARD_BYTES", 40_000)
        merge(recipe, theirs[kind], tmp_path / "m")
        assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
        identical(everything(tmp_path / "m"), everything(theirs[kind]["original"].parent / job))

    @pytest.mark.parametrize("memory", [0, 100_000])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_whatever_is_kept_and_however_many_threads(self, theirs, memory, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        merger = Merger(theirs["untied"], memory)
        try:
            for job in ("untied-ties", "untied-ties-thin", "untied-dare_ties"):
                identical(dict(merger.tensors(asked(job)[1])), everything(theirs["untied"]["original"].parent / job))
            with ThreadPoolExecutor(1) as other: assert other.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == threads and sum(t.nbytes for t in merger.kept.held.values()) <= memory
        finally: torch.set_num_threads(before)

    def test_another_density_sorts_nothing(self, theirs, monkeypatch):
        merger, sorts, argsort = Merger(theirs["untied"]), [], torch.argsort
        monkeypatch.setattr(torch, "argsort", lambda t, **how: sorts.append(t.numel()) or argsort(t, **how))
        identical(dict(merger.tensors(asked("untied-ties")[1])), everything(theirs["untied"]["original"].parent / "untied-ties"))
        assert len(sorts) == 2 * len(Weights(theirs["untied"]["original"]))
        identical(dict(merger.tensors(asked("untied-ties-thin")[1])), everything(theirs["untied"]["original"].parent / "untied-ties-thin"))
        assert len(sorts) == 2 * len(Weights(theirs["untied"]["original"]))


class TestInMemory:
    def test_what_comes_out_is_not_what_is_kept(self, models):
        merger = Merger(models)
        copy = Recipe("copy", dict(merge_method="passthrough", dtype="float32", models=[{"model": "cpt"}]), {})
        for _, t in merger.tensors(copy): t.zero_()
        source = Weights(models["cpt"])
        identical(dict(merger.tensors(copy)), {k: source[k] for k in source})

    def test_left_half_way_it_ends_and_leaves_threads_and_chance_alone(self, models):
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        made = Merger(models).tensors(only(CANDIDATES["dare"]))
        next(made)
        made.close()
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads

    @pytest.mark.parametrize("change, said", [
        ({"merge_method": "slurp"}, "slurp"), ({"base_model": "bsae"}, "no model 'bsae'; there are original"),
        ({"tokenizer_source": "union"}, "leave tokenizer_source out"), ({"chat_template": "auto"}, "leave chat_template out"),
        ({"models": [{"model": "cpt", "parameters": {}}]}, "weight"), ({"models": None}, "models"),
        ({"models": None, "merge_method": "passthrough", "base_model": None, "slices": HALVES[:1]}, "as many layers")])
    def test_what_cannot_be_made_is_said(self, models, tmp_path, change, said):
        recipe = Recipe("x", LISTING | {"dtype": "float32"} | change, {})
        for make in (lambda: list(Merger(models).tensors(recipe)), lambda: merge(recipe, models, tmp_path / "m")):
            with pytest.raises(UserError, match=r"^merge\.candidates\.x: ") as e: make()
            assert said in str(e.value)
        assert not list(tmp_path.iterdir())

    def test_a_pickle_is_not_opened(self, models, tmp_path):
        pickled = shutil.copytree(models["cpt"], tmp_path / "cpt")
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
        with pytest.raises(UserError, match="lacks safetensors"): Merger(models | {"cpt": pickled})


class TestNormalize:
    "Two weights give one model under normalize: true, and two under the setting chosen for an open one."
    def pair(self, models, tmp_path, method, normalize, sibling=False):
        for w in (0.2, 0.8):
            c = Candidate(name=f"w{w}", method=method, weight=w, density=0.5, normalize=normalize)
            note = merge(only(c, sibling=sibling), models, tmp_path / c.name)
        low, high = Weights(tmp_path / "w0.2"), Weights(tmp_path / "w0.8")
        return note, max((low[k] - high[k]).abs().max().item() for k in low)

    @pytest.mark.parametrize("method", ["ties", "dare_ties"])
    def test_asked_for_it_cancels_the_weight_and_the_note_says_so(self, models, tmp_path, method):
        note, apart = self.pair(models, tmp_path, method, True)
        assert apart < 1e-6 and "has no effect" in note

    @pytest.mark.parametrize("method", ["ties", "dare_ties"])
    def test_left_open_the_weight_counts(self, models, tmp_path, method):
        note, apart = self.pair(models, tmp_path, method, None)
        assert apart > 1e-3 and "normalize: false is used" in note

    def test_over_a_sibling_nothing_cancels(self, models, tmp_path):
        note, apart = self.pair(models, tmp_path, "ties", True, sibling=True)
        assert apart > 1e-4 and not note


def test_dare_is_its_seed(models, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        unseeded = CANDIDATES["dare"].model_copy(update={"seeds": None})
        merge(only(unseeded, seed=seed), models, tmp_path / name)
    a, b, c = (Weights(tmp_path / n) for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


class TestWhatComesAlong:
    def test_template_and_ids_are_the_originals_over_a_bare_base(self, models, tmp_path):
        base = shutil.copytree(models["base"], tmp_path / "base")
        for f in base.glob("chat_template*"): f.unlink()
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
        assert rendered(base) != rendered(models["original"])
        merge(only(CANDIDATES["ties"], sibling=True), models | {"base": base}, tmp_path / "m")
        assert rendered(tmp_path / "m") == rendered(models["original"]) is not None
        for f in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "m" / f).read_bytes() == (models["original"] / f).read_bytes()

    def test_the_yaml_names_models_not_places(self, models, tmp_path):
        merge(only(CANDIDATES["ties"], sibling=True), models, tmp_path / "m")
        text = (tmp_path / "m" / "mergekit_config.yml").read_text()
        assert "/" not in text.replace("OUT, beside", "") and yaml.safe_load(text)["base_model"] == "base"
        assert not [f for f in (tmp_path / "m").iterdir() if f.suffix in (".py", ".md")]

    def test_the_narrower_source_costs_no_bits(self, models, tmp_path):
        half = altered(models["original"], tmp_path / "half", lambda k, t: t.bfloat16())
        both = {"original": half, "cpt": models["cpt"]}
        merge(only(CANDIDATES["linear"], dtype=common_dtype(both.values())), both, tmp_path / "m")
        assert Weights(tmp_path / "m").dtypes == {"F32"}
        assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float32"

    def test_paths_with_signs_mergekit_would_split(self, models, tmp_path):
        odd = shutil.copytree(models["cpt"], tmp_path / "cpt@20+lora")
        merge(only(CANDIDATES["linear"]), models | {"cpt": odd}, tmp_path / "m")
        merge(only(CANDIDATES["linear"]), models, tmp_path / "n")
        check(tmp_path / "m", Weights(tmp_path / "n").__getitem__)

    def test_a_model_written_anew_is_read_anew(self, models, tmp_path):
        cpt = shutil.copytree(models["cpt"], tmp_path / "cpt")
        merge(only(CANDIDATES["linear"]), models | {"cpt": cpt}, tmp_path / "m")
        shutil.rmtree(cpt)
        shutil.copytree(models["far"], cpt)
        merge(only(CANDIDATES["linear"]), models | {"cpt": cpt}, tmp_path / "n")
        merge(only(CANDIDATES["linear"]), models | {"cpt": models["far"]}, tmp_path / "far")
        check(tmp_path / "n", Weights(tmp_path / "far").__getitem__)


KEEP_MERGING = """
import resource, signal, sys
from pathlib import Path
from domain_adapt.merge import merge
from domain_adapt.params import Candidate, UserError
from domain_adapt.recipe import recipes
original, cpt, out, limit = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would a child
if int(limit): resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    for i in range(10_000):
        c = Candidate(name=f"m{i}", method="ties", weight=0.5, density=0.5)
        merge(recipes(c)[0], {"original": Path(original), "cpt": Path(cpt)}, Path(out) / c.name)
except UserError as e: sys.exit(f"UserError: {e}")
"""


@pytest.mark.fault
class TestStopped:
    def start(self, models, out, limit=0):
        words = [sys.executable, "-c", KEEP_MERGING, models["original"], models["cpt"], out, limit]
        return subprocess.Popen([str(w) for w in words], stderr=subprocess.PIPE, text=True)

    @pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
    def test_what_bears_a_name_is_whole(self, models, tmp_path, sign):
        with self.start(models, tmp_path) as process:
            deadline = time.monotonic() + 300
            while not (tmp_path / "m1").exists() and time.monotonic() < deadline: time.sleep(0.01)
            process.send_signal(sign)
            try: process.communicate(timeout=60)
            finally: process.kill()
        named = [f for f in tmp_path.iterdir() if not f.name.startswith(".")]
        assert len(named) >= 2 and process.returncode
        for f in named: assert check_merged(f, models["original"], "float32") == ""
        assert all((f / "mergekit_config.yml").exists() for f in named)
        if sign == signal.SIGINT: assert len(named) == len(list(tmp_path.iterdir()))

    def test_a_full_disk_is_named_and_leaves_nothing(self, models, tmp_path):
        size = (models["original"] / "model.safetensors").stat().st_size
        with self.start(models, tmp_path, size // 2) as process: said = process.communicate(timeout=300)[1]
        assert f"UserError: {tmp_path / 'm0'}: merge m0 could not be written" in said
        assert "File too large" in said
        assert not list(tmp_path.iterdir())

    def test_an_interrupt_that_networkx_swallows_still_ends_it(self, models, tmp_path, monkeypatch):
        swallow = merging.build_schedule

        def interrupted(*words, **how):
            try: signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt: pass
            return swallow(*words, **how)
        monkeypatch.setattr(merging, "build_schedule", interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt): merge(only(CANDIDATES["ties"]), models, tmp_path / "m")
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not list(tmp_path.iterdir())
        finally: signal.signal(signal.SIGINT, before)
