"""Merges against the formulae in plain torch, against mergekit's command, and under damage."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from domain_adapt.geometry import Weights
from domain_adapt.merge import check_mergeable, check_merged, common_dtype, merge, recipe, rendered
from domain_adapt.params import Candidate, UserError

CANDIDATES = {c.name: c for c in (
    Candidate(name="linear", method="linear", weight=0.3), Candidate(name="slerp", method="slerp", t=0.4),
    Candidate(name="ties", method="ties", weight=0.7, density=0.3),
    Candidate(name="dare", method="dare_ties", weight=0.7, density=0.6, seed=5))}


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
        merge(recipe(CANDIDATES["linear"]), models, tmp_path / "m")
        a, b, w = Weights(models["original"]), Weights(models["cpt"]), torch.tensor([0.7, 0.3])
        check(tmp_path / "m", lambda k: (a[k] * w[0]).addcmul(b[k], w[1]) / w.sum())

    @pytest.mark.parametrize("other, arcs", [("near", False), ("cpt", True), ("far", True)])
    def test_slerp(self, models, tmp_path, other, arcs):
        merge(recipe(CANDIDATES["slerp"]), models | {"cpt": models[other]}, tmp_path / "m")
        a, b = Weights(models["original"]), Weights(models[other])
        matrices = [k for k in a if a[k].dim() == 2]
        cosines = [torch.cosine_similarity(a[k].flatten(), b[k].flatten(), 0) for k in matrices]
        assert all((c.abs() <= 0.9995) == arcs for c in cosines)
        check(tmp_path / "m", lambda k: slerp(a[k].flatten(), b[k].flatten(), 0.4).view_as(a[k]))

    def test_ties(self, models, tmp_path):
        merge(recipe(CANDIDATES["ties"]), models, tmp_path / "m")
        a, b = Weights(models["original"]), Weights(models["cpt"])
        check(tmp_path / "m", lambda k: a[k] + 0.7 * trim(b[k] - a[k], 0.3))

    @pytest.mark.parametrize("normalize", [None, False])
    def test_ties_over_the_sibling_merges_two_task_vectors(self, models, tmp_path, normalize):
        candidate = CANDIDATES["ties"].model_copy(update={"normalize": normalize})
        merge(recipe(candidate, sibling=True), models, tmp_path / "m")
        base, a, b = (Weights(models[n]) for n in ("base", "original", "cpt"))
        w = torch.tensor([0.7, 0.3])
        check(tmp_path / "m", lambda k: base[k] + elect(
            [w[0] * trim(b[k] - base[k], 0.3), w[1] * (a[k] - base[k])], w, normalize is None))

    def test_dare_under_the_same_mask(self, models, tmp_path):
        merge(recipe(CANDIDATES["dare"]), models, tmp_path / "m")
        a, b = Weights(models["original"]), Weights(models["cpt"])
        torch.manual_seed(5)
        masks = {k: torch.bernoulli(torch.full_like(a[k], 0.6)) for k in sorted(a)}

        def formula(k):
            delta, kept = b[k] - a[k], (b[k] - a[k]) * masks[k]
            return a[k] + 0.7 * (kept * (delta.abs().sum() / kept.abs().sum()))
        check(tmp_path / "m", formula)


@pytest.mark.oracle
def test_mergekits_own_command_gives_the_same_from_the_kept_yaml(models, tmp_path):
    "mergekit-yaml's entry point, for all the methods in one process, where links have the models' names."
    for n in ("original", "cpt", "base"): (tmp_path / n).symlink_to(models[n])
    jobs = []
    for name, sibling in [(n, False) for n in CANDIDATES] + [("ties", True), ("dare", True)]:
        r = recipe(CANDIDATES[name], sibling=sibling)
        ours = f"{name}-{sibling}"
        merge(r, models, tmp_path / ours)
        seed = re.findall(r"--random-seed \d+", r.yaml)
        jobs.append([f"{ours}/mergekit_config.yml", f"{ours}-theirs", "--quiet", "--no-write-model-card",
                     *" ".join(seed).split()])
    script = "import json, sys; from mergekit.scripts.run_yaml import main\n" \
             "for job in json.loads(sys.argv[1]): main(job, standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", script, json.dumps(jobs)], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONHASHSEED": "123"})
    assert not done.returncode, done.stderr
    for job in jobs: check(tmp_path / job[0].split("/")[0], Weights(tmp_path / job[1]).__getitem__)


class TestNormalize:
    "Two weights give one model under normalize: true, and two under the setting chosen for an open one."
    def pair(self, models, tmp_path, method, normalize, sibling=False):
        for w in (0.2, 0.8):
            c = Candidate(name=f"w{w}", method=method, weight=w, density=0.5, normalize=normalize)
            note = merge(recipe(c, sibling=sibling), models, tmp_path / c.name)
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
        unseeded = CANDIDATES["dare"].model_copy(update={"seed": None})
        merge(recipe(unseeded, seed=seed), models, tmp_path / name)
    a, b, c = (Weights(tmp_path / n) for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


class TestWhatComesAlong:
    def test_template_and_ids_are_the_originals_over_a_bare_base(self, models, tmp_path):
        base = shutil.copytree(models["base"], tmp_path / "base")
        for f in base.glob("chat_template*"): f.unlink()
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
        assert rendered(base) != rendered(models["original"])
        merge(recipe(CANDIDATES["ties"], sibling=True), models | {"base": base}, tmp_path / "m")
        assert rendered(tmp_path / "m") == rendered(models["original"]) is not None
        for f in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "m" / f).read_bytes() == (models["original"] / f).read_bytes()

    def test_the_yaml_names_models_not_places(self, models, tmp_path):
        merge(recipe(CANDIDATES["ties"], sibling=True), models, tmp_path / "m")
        text = (tmp_path / "m" / "mergekit_config.yml").read_text()
        assert "/" not in text.replace("OUT, beside", "") and yaml.safe_load(text)["base_model"] == "base"
        assert not [f for f in (tmp_path / "m").iterdir() if f.suffix in (".py", ".md")]

    def test_the_narrower_source_costs_no_bits(self, models, tmp_path):
        half = altered(models["original"], tmp_path / "half", lambda k, t: t.bfloat16())
        both = {"original": half, "cpt": models["cpt"]}
        merge(recipe(CANDIDATES["linear"], dtype=common_dtype(both.values())), both, tmp_path / "m")
        assert Weights(tmp_path / "m").dtypes == {"F32"}
        assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float32"

    def test_paths_with_signs_mergekit_would_split(self, models, tmp_path):
        odd = shutil.copytree(models["cpt"], tmp_path / "cpt@20+lora")
        merge(recipe(CANDIDATES["linear"]), models | {"cpt": odd}, tmp_path / "m")
        merge(recipe(CANDIDATES["linear"]), models, tmp_path / "n")
        check(tmp_path / "m", Weights(tmp_path / "n").__getitem__)

    def test_a_model_written_anew_is_read_anew(self, models, tmp_path):
        cpt = shutil.copytree(models["cpt"], tmp_path / "cpt")
        merge(recipe(CANDIDATES["linear"]), models | {"cpt": cpt}, tmp_path / "m")
        shutil.rmtree(cpt)
        shutil.copytree(models["far"], cpt)
        merge(recipe(CANDIDATES["linear"]), models | {"cpt": cpt}, tmp_path / "n")
        merge(recipe(CANDIDATES["linear"]), models | {"cpt": models["far"]}, tmp_path / "far")
        check(tmp_path / "n", Weights(tmp_path / "far").__getitem__)


KEEP_MERGING = """
import resource, sys
from pathlib import Path
from domain_adapt.merge import merge, recipe
from domain_adapt.params import Candidate, UserError
original, cpt, out, limit = sys.argv[1:]
if int(limit): resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    for i in range(10_000):
        c = Candidate(name=f"m{i}", method="ties", weight=0.5, density=0.5)
        merge(recipe(c), {"original": Path(original), "cpt": Path(cpt)}, Path(out) / c.name)
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
            process.communicate(timeout=120)
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


def test_other_shapes_are_refused_by_name(models, tmp_path, make_model):
    make_model(tmp_path / "wide", hidden=128)
    with pytest.raises(UserError, match=r"cpt model .*wide.*embed_tokens"):
        check_mergeable({"original": models["original"], "cpt": tmp_path / "wide"})
