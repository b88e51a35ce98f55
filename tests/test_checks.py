"""What is refused before a merge and after it, each by name with both values, and what is never run."""
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from domain_adapt.checks import (as_safetensors, carry_over, check_mergeable, check_merged, check_recipe, common_dtype, parents_of,
                                 rendered, sane)
from domain_adapt.geometry import Weights
from domain_adapt.merge import merge
from domain_adapt.models import get_model, load_model
from domain_adapt.params import Candidate, UserError
from domain_adapt.recipe import Recipe, recipes
from domain_adapt.runs import ROOT


def altered(source, to, change):
    "A copy of a model folder with its tensors changed: `change(tensors)` gives the new ones."
    shutil.copytree(source, to)
    save_file({k: t.contiguous() for k, t in change(load_file(to / "model.safetensors")).items()}, to / "model.safetensors",
              metadata={"format": "pt"})
    return to


def each(change): return lambda tensors: {k: change(t) for k, t in tensors.items()}


@pytest.fixture
def cpt(tiny_llama, tmp_path): return altered(tiny_llama, tmp_path / "cpt", each(lambda t: t * 1.01))


def says(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def retokenized(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def swap_two(folder):
    "Two tokens change ids: nothing has another size."
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    a, b = [t for t in vocab if len(t) == 1][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(data))


class TestBefore:
    def refused(self, tiny_llama, folder, said, name="cpt"):
        with pytest.raises(UserError, match=said) as e: check_mergeable({"original": tiny_llama, name: folder})
        assert f"{name} model {folder}" in str(e.value) and "the original's" in str(e.value)

    def test_models_that_fit_pass_without_a_word(self, tiny_llama, cpt):
        assert check_mergeable({"original": tiny_llama, "cpt": cpt}) == []

    def test_other_shapes(self, tiny_llama, tmp_path, make_model):
        make_model(tmp_path / "wide", hidden=128)
        self.refused(tiny_llama, tmp_path / "wide", r"embed_tokens.weight is \(\d+, 128\), the original's \(\d+, 32\)")

    @pytest.mark.parametrize("entries, said", [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "model_type is mistral, the original's llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"\['LlamaForSequenceClassification'\], the original's \['LlamaForCausalLM'\]"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "5000000.0.*, the original's .*10000.0"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None}, "num_attention_heads is 1, the original's"),
        ({"hidden_act": "relu"}, "hidden_act is relu, the original's silu")], ids=["type", "class", "rope", "heads", "activation"])
    def test_other_architectures_of_the_same_shapes(self, tiny_llama, cpt, entries, said):
        says(cpt, **entries)
        self.refused(tiny_llama, cpt, said)

    @pytest.mark.parametrize("change, said", [
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, r"model.norm.weight is missing, the original's \(32,\)"),
        (lambda t: t | {"model.extra.weight": torch.ones(3)}, r"model.extra.weight is \(3,\), the original's missing")], ids=["missing", "more"])
    def test_missing_and_extra_tensors(self, tiny_llama, tmp_path, change, said):
        self.refused(tiny_llama, altered(tiny_llama, tmp_path / "cpt", change), said)

    @pytest.mark.parametrize("change, said", [
        (lambda f: retokenized(f, lambda t: t.add_tokens(["<extra>"])), r"1 tokens of the vocabulary.*<extra> is \d+, the original's missing"),
        (swap_two, r"2 tokens of the vocabulary .* is \d+, the original's \d+")], ids=["one more", "swapped"])
    def test_another_vocabulary(self, tiny_llama, cpt, change, said):
        change(cpt)
        self.refused(tiny_llama, cpt, said)

    @pytest.mark.parametrize("special", ["bos_token", "eos_token", "unk_token"])
    def test_another_special_token(self, tiny_llama, cpt, special):
        before = getattr(AutoTokenizer.from_pretrained(tiny_llama), f"{special}_id")
        other = next(t for t, i in AutoTokenizer.from_pretrained(cpt).get_vocab().items() if i == 9)
        retokenized(cpt, lambda t: setattr(t, special, other))
        self.refused(tiny_llama, cpt, rf"{special} is 9, the original's {'missing' if before is None else before}")

    def test_a_padding_token_that_only_one_has_is_no_conflict(self, tiny_llama, cpt, tmp_path):
        other = shutil.copytree(cpt, tmp_path / "other")
        retokenized(other, lambda t: setattr(t, "pad_token", None))
        assert check_mergeable({"original": tiny_llama, "cpt": other}) == []

    def test_of_a_base_another_special_token_is_told(self, tiny_llama, cpt, tmp_path):
        base = shutil.copytree(cpt, tmp_path / "base")
        other = next(t for t, i in AutoTokenizer.from_pretrained(base).get_vocab().items() if i == 9)
        retokenized(base, lambda t: setattr(t, "eos_token", other))
        note, = check_mergeable({"original": tiny_llama, "cpt": cpt, "base": base})
        assert "base model" in note and "eos_token is 9" in note and "the original's" in note
        swap_two(base)
        with pytest.raises(UserError, match="tokens of the vocabulary"): check_mergeable({"original": tiny_llama, "cpt": cpt, "base": base})

    def test_the_same_folder_twice(self, tiny_llama, tmp_path):
        (tmp_path / "link").symlink_to(tiny_llama)
        with pytest.raises(UserError, match="nothing to merge"): check_mergeable({"original": tiny_llama, "cpt": tmp_path / "link"})


class TestTypes:
    def linear(self, verbatim=True, **more):
        both = [{"model": m, "parameters": {"weight": 0.5}} for m in ("original", "cpt")]
        return Recipe("own", {"merge_method": "linear", "models": both} | more, {}, verbatim=verbatim)

    @pytest.fixture
    def mixed(self, tiny_llama, tmp_path):
        return {"original": altered(tiny_llama, tmp_path / "half", each(lambda t: t.bfloat16())), "cpt": tiny_llama}

    @pytest.mark.parametrize("key", ["dtype", "out_dtype"])
    def test_loss_is_refused_unless_it_is_asked_for(self, mixed, key):
        asked = {"dtype": "float32"} | {key: "bfloat16"}
        with pytest.raises(UserError, match=rf"merge.candidates.own: {key}: bfloat16 .*cpt is float32, original is bfloat16.*take float32"):
            check_recipe(self.linear(False, **asked), mixed)
        note, = check_recipe(self.linear(**asked), mixed)
        assert "rounded, as the configuration asks" in note

    def test_bf16_and_fp16_do_not_hold_each_other(self, tiny_llama, tmp_path):
        half = altered(tiny_llama, tmp_path / "half", each(lambda t: t.half()))
        models = {"original": half, "cpt": half}
        assert check_recipe(self.linear(False, dtype="float16"), models) == []
        with pytest.raises(UserError, match="take float16"): check_recipe(self.linear(False, dtype="bfloat16"), models)

    def test_no_type_where_they_differ(self, mixed, tiny_llama):
        with pytest.raises(UserError, match="says no dtype.*add dtype: float32"): check_recipe(self.linear(), mixed)
        assert check_recipe(self.linear(), {"original": tiny_llama, "cpt": tiny_llama}) == []

    def test_what_is_written_here_never_loses_any(self, mixed):
        made = recipes(Candidate(name="x", method="linear", weight=0.5), dtype=common_dtype(mixed.values()))
        assert [check_recipe(r, mixed) for r in made] == [[]]

    def test_models_that_are_not_there(self, mixed):
        with pytest.raises(UserError, match=r"merge.candidates.own: there is no model chat; there are original, cpt"):
            check_recipe(self.linear(dtype="float32", base_model="chat"), mixed)


class TestAfter:
    def test_norms_within_bounds_pass(self, tiny_llama, cpt):
        assert check_merged(cpt, tiny_llama, "float32", [tiny_llama, cpt]) == ""

    @pytest.mark.parametrize("scale, fine", [(0.51, True), (0.49, False), (1.98, True), (2.05, False)])
    def test_one_tensor_out_of_bounds_is_named_with_its_norms(self, tiny_llama, cpt, tmp_path, scale, fine):
        k = "model.layers.1.mlp.down_proj.weight"
        folder = altered(tiny_llama, tmp_path / "m", lambda t: t | {k: t[k] * scale})
        if fine:
            assert check_merged(folder, tiny_llama, "float32", [tiny_llama, cpt]) == ""
            return
        norms = [Weights(f)[k].norm().item() for f in (folder, tiny_llama, cpt)]
        with pytest.raises(UserError, match=k) as e: check_merged(folder, tiny_llama, "float32", [tiny_llama, cpt])
        assert all(f"{n:.4g}" in str(e.value) for n in norms) and str(e.value).startswith("1 tensors")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_one_value_that_is_not_finite(self, tiny_llama, tmp_path, value):
        def spoil(t):
            t["model.norm.weight"][7] = value
            return t
        folder = altered(tiny_llama, tmp_path / "m", spoil)
        with pytest.raises(UserError, match="not finite in 1 tensors, first model.norm.weight"):
            check_merged(folder, tiny_llama, "float32", [tiny_llama])

    def test_the_vocabulary_is_kept(self, tiny_llama, cpt):
        size = json.loads((cpt / "config.json").read_text())["vocab_size"]
        says(cpt, vocab_size=size - 1)
        with pytest.raises(UserError, match=f"vocab_size is {size - 1}, the original's {size}"): check_merged(cpt, tiny_llama, "float32")

    def test_a_lost_template(self, tiny_llama, cpt):
        for f in cpt.glob("chat_template*"): f.unlink()
        assert rendered(cpt) is None != rendered(tiny_llama)
        with pytest.raises(UserError, match="chat template"): check_merged(cpt, tiny_llama, "float32")

    def test_a_merge_out_of_bounds_is_not_kept(self, tiny_llama, cpt, tmp_path):
        wild = [{"model": "original", "parameters": {"weight": 3.0}}, {"model": "cpt", "parameters": {"weight": 3.0}}]
        recipe = Recipe("wild", {"merge_method": "linear", "models": wild, "dtype": "float32", "parameters": {"normalize": False}}, {})
        models = {"original": tiny_llama, "cpt": cpt}
        with pytest.raises(UserError, match="merge.candidates.wild: .*times their parents'.*not kept"): merge(recipe, models, tmp_path / "out" / "wild")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_slices_have_no_parents_to_compare_with(self, tiny_llama):
        sliced = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "original", "layer_range": [0, 2]}]}]}
        assert parents_of(Recipe("s", sliced, {}), {"original": tiny_llama}) == []

    @pytest.mark.parametrize("bits, fine", [(0.1, True), (1.5, True), (1.51, False), (float("nan"), False), (float("inf"), False)])
    def test_bits_per_byte(self, bits, fine):
        if fine:
            sane(bits, {"original": 1.0, "cpt": 0.8})
            return
        with pytest.raises(UserError, match="original, the worst of its parents, needs 1.000"): sane(bits, {"original": 1.0, "cpt": 0.8})


class Calls:
    "A hostile pickle: unpickled, it makes a folder."
    def __init__(self, at): self.at = str(at)
    def __reduce__(self): return os.mkdir, (self.at,)


@pytest.mark.fault
class TestPickles:
    @pytest.fixture
    def pickled(self, cpt, tmp_path, monkeypatch):
        "A model in two pickled shards, and nothing else of weights."
        monkeypatch.setenv("DOMAIN_ADAPT_CACHE", str(tmp_path / "cache"))
        tensors = load_file(cpt / "model.safetensors")
        names = sorted(tensors)
        for n, part in enumerate((names[:5], names[5:]), 1):
            torch.save({k: tensors[k] for k in part}, cpt / f"pytorch_model-0000{n}-of-00002.bin")
        (cpt / "model.safetensors").unlink()
        return cpt, tensors

    def test_refused_with_the_way_out(self, pickled):
        for call in (lambda: as_safetensors(pickled[0]), lambda: get_model(str(pickled[0]))):
            with pytest.raises(UserError, match="pytorch_model-00001-of-00002.bin.*set merge.allow_pickle: true"): call()

    def test_allowed_they_become_safetensors_that_merge(self, pickled, tiny_llama, tmp_path):
        folder, tensors = pickled
        (folder / "modeling_own.py").write_text("raise SystemExit")
        safe = as_safetensors(get_model(str(folder), allow_pickle=True), allow_pickle=True)
        assert safe.is_relative_to(tmp_path / "cache") and {f.suffix for f in safe.iterdir()} <= {".safetensors", ".json", ".jinja"}
        assert len(list(safe.glob("*.safetensors"))) == 2
        held = Weights(safe)
        assert held.keys() == tensors.keys() and all(torch.equal(held[k], t) for k, t in tensors.items())
        assert check_mergeable({"original": tiny_llama, "cpt": safe}) == [] and load_model(safe, "fp32")
        stamp = (safe / "config.json").stat().st_mtime_ns
        assert as_safetensors(folder, allow_pickle=True) == safe and (safe / "config.json").stat().st_mtime_ns == stamp
        assert as_safetensors(safe) == safe

    def test_changed_pickles_are_read_anew(self, pickled):
        folder, tensors = pickled
        first = as_safetensors(folder, allow_pickle=True)
        torch.save({"model.norm.weight": torch.full((32,), 5.0)}, folder / "pytorch_model-00002-of-00002.bin")
        second = as_safetensors(folder, allow_pickle=True)
        assert first != second and (Weights(second)["model.norm.weight"] == 5).all()

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("inside", [lambda c: {"w": torch.ones(2), "x": c}, lambda c: c])
    def test_code_is_never_run(self, pickled, tmp_path, inside, legacy):
        folder, _ = pickled
        save = lambda at: torch.save(inside(Calls(at)), folder / "pytorch_model-00001-of-00002.bin", _use_new_zipfile_serialization=not legacy)
        save(tmp_path / "proof")
        torch.load(folder / "pytorch_model-00001-of-00002.bin", weights_only=False)
        assert (tmp_path / "proof").is_dir()    # the pickle does what it should
        save(tmp_path / "ran")
        with pytest.raises(UserError, match="00001-of-00002.bin: holds more than tensors"): as_safetensors(folder, allow_pickle=True)
        assert not (tmp_path / "ran").exists() and not list((tmp_path / "cache" / "models").glob("*"))

    @pytest.mark.parametrize("held", [[torch.ones(2)], {"w": 3}, {"model": {"w": torch.ones(2)}}, torch.ones(2)], ids=["list", "number", "nested", "one"])
    def test_no_table_of_tensors(self, pickled, held):
        torch.save(held, pickled[0] / "pytorch_model-00001-of-00002.bin")
        with pytest.raises(UserError, match="no table of tensors"): as_safetensors(pickled[0], allow_pickle=True)

    def test_a_torn_pickle(self, pickled):
        file = pickled[0] / "pytorch_model-00001-of-00002.bin"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(UserError, match="damaged"): as_safetensors(pickled[0], allow_pickle=True)

    def test_tied_and_shared_tensors(self, pickled):
        folder, _ = pickled
        t = torch.arange(6.).reshape(2, 3)
        for f in folder.glob("*.bin"): f.unlink()
        torch.save({"a": t, "b": t, "c": t.T}, folder / "pytorch_model.bin")
        held = Weights(as_safetensors(folder, allow_pickle=True))
        assert torch.equal(held["a"], t) and torch.equal(held["b"], t) and torch.equal(held["c"], t.T)


class TestCode:
    "What a model's folder brings along is never run, nor copied."
    @pytest.fixture
    def hostile(self, cpt, tmp_path):
        code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        for name in ("modeling_own.py", "tokenizer.py", "tokenization_own.py", "configuration_own.py"): (cpt / name).write_text(code)
        says(cpt, auto_map={"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"})
        (cpt / "additional_chat_templates").mkdir()
        (cpt / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
        (cpt / "additional_chat_templates" / "x.py").write_text(code)
        return cpt

    def test_checks_and_merges_run_none_of_it(self, hostile, tiny_llama, tmp_path):
        models = {"original": hostile, "cpt": tiny_llama}
        recipe, = recipes(Candidate(name="m", method="linear", weight=0.5))
        check_mergeable(models), check_recipe(recipe, models), merge(recipe, models, tmp_path / "m")
        assert not (tmp_path / "ran").exists() and not [m for m in sys.modules if "modeling_own" in m]
        assert not list((tmp_path / "m").rglob("*.py")) and (tmp_path / "m" / "additional_chat_templates" / "rag.jinja").exists()

    def test_only_plain_files_are_carried_over(self, hostile, tmp_path):
        (tmp_path / "to").mkdir()
        (hostile / "LICENSE").write_text("free"), (hostile / "tokenizer.so").touch()
        carry_over(hostile, tmp_path / "to", "float32")
        assert (tmp_path / "to" / "LICENSE").read_text() == "free"
        assert {f.suffix for f in (tmp_path / "to").rglob("*") if f.is_file()} <= {"", ".json", ".jinja"}

    def test_remote_code_is_trusted_nowhere(self):
        sources = [*(ROOT / "domain_adapt").rglob("*.py"), *(ROOT / "nbs").rglob("*.ipynb")]
        assert len(sources) > 50
        assert not [f for f in sources if "trust_remote_code=True" in (text := f.read_text().replace(" ", "")) or '"trust_remote_code":True' in text]
