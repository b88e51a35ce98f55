"""Task vectors: figures against plain torch and mergekit, and weights wherever they lie."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.merge_methods.slerp import slerp
from safetensors.torch import load_file, save_file

from domain_adapt.geometry import Weights, geometry, place, same_weights
from domain_adapt.params import UserError


@pytest.fixture(scope="module")
def trio(tmp_path_factory, make_model):
    "Three models: a; b near it; c further off, and with a's norms."
    at = tmp_path_factory.mktemp("geometry")
    make_model(at / "a")
    tensors, g = load_file(at / "a" / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, far in (("b", 0.0005), ("c", 0.02)):
        shutil.copytree(at / "a", at / name)
        moved = {k: t if name == "c" and "norm" in k else t + far * torch.randn(t.shape, generator=g) for k, t in tensors.items()}
        save_file(moved, at / name / "model.safetensors")
    return {name: at / name for name in "abc"}


def sharded(folder, to):
    "The same model with every tensor in one of two files, as large models are stored."
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    files = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(tensors))}
    for file in set(files.values()): save_file({k: tensors[k] for k in files if files[k] == file}, to / file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return to


def whole(folder, module=None) -> torch.Tensor:
    "All weights of a module, or of the model, as one float64 vector, read at once by safetensors itself."
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[k].double().flatten() for k in sorted(tensors) if module in (None, "all", place(k)[0])])


def cosine(x, y) -> float: return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.oracle
@pytest.mark.parametrize("base", ["a", "b"])
def test_figures_are_those_of_plain_torch_on_whole_models(trio, base):
    table = geometry(trio, base)
    modules = {place(k)[0] for k in Weights(trio["a"])} | {"all"}
    assert {"embed_tokens", "norm", "layers.1.attention"} <= modules
    others = [m for m in trio if m != base]
    pairs = [(others[0], base), (others[1], base), tuple(others)]
    assert list(table.groupby(["model", "against"], sort=False).groups) == pairs
    assert all(set(t.module) == modules and t.module.iloc[-1] == "all" for _, t in table.groupby(["model", "against"]))
    for row in table.itertuples():
        o, x, y = (whole(trio[m], row.module) for m in (base, row.model, row.against))
        near = lambda got, wanted: got == pytest.approx(float(wanted), rel=1e-6, nan_ok=True)
        assert row.parameters == len(o) and near(row.weight_norm, o.norm()) and near(row.task_vector_norm, (x - o).norm())
        assert near(row.relative_norm, (x - o).norm() / o.norm()) and near(row.distance, (x - y).norm())
        assert 1 - row.cosine_of_weights == pytest.approx(1 - cosine(x, y), rel=1e-6, abs=1e-15)
        if row.against == base:
            assert np.isnan([row.norm_ratio, row.cosine_of_task_vectors, row.sign_conflict, row.elections_won]).all()
            continue
        d, e = ((v.float() - o.float()).double() for v in (x, y))
        both, opposite = (d != 0) & (e != 0), d.sign() * e.sign() < 0
        size, elected = d.abs() + e.abs(), torch.where(d + e >= 0, 1, -1)
        assert near(row.norm_ratio, d.norm() / e.norm() if e.norm() else np.nan) and near(row.cosine_of_task_vectors, cosine(d, e))
        assert near(row.sign_conflict, opposite.sum() / both.sum())
        assert near(row.sign_conflict_weighted, size[opposite].sum() / size[both].sum())
        assert near(row.elections_won, (elected == d.sign())[opposite].sum() / opposite.sum())


@pytest.mark.oracle
def test_the_election_is_mergekits(trio):
    "Where signs differ, TIES with nothing trimmed gives the sum to whom `elections_won` says."
    (row,) = geometry(trio, "a").query("model == 'b' and against == 'c' and module == 'all'").itertuples()
    o, x, y = (whole(trio[m]).float() for m in "abc")
    deltas = torch.stack([x - o, y - o])
    mask = get_mask(deltas)
    opposite = deltas[0].sign() * deltas[1].sign() < 0
    assert row.elections_won == pytest.approx(float(mask[0][opposite].float().mean()), rel=1e-6)


@pytest.mark.oracle
def test_slerp_is_as_far_from_linear_as_mergekit_makes_it(trio):
    for row in geometry(trio, "a").query("module == 'all'").itertuples():
        x, y = (load_file(trio[m] / "model.safetensors") for m in (row.model, row.against))
        half, apart, straight = torch.tensor([0.5], dtype=torch.float64), 0.0, 0
        for k in x:
            p, q = x[k].double()[None], y[k].double()[None]
            d = float((slerp(half, p, q) - (p + q) / 2).square().sum())
            apart, straight = apart + d, straight + x[k].numel() * (d < 1e-18)
        assert row.slerp_distance == pytest.approx(apart ** 0.5, rel=1e-5)
        assert row.slerp_is_linear == pytest.approx(straight / row.parameters)
    assert 0 < row.slerp_is_linear < 1


@pytest.mark.equality
def test_shards_and_parts_and_threads_give_the_same_table(trio, tmp_path, monkeypatch):
    table = geometry(trio, "a")
    split = {m: sharded(f, tmp_path / m) for m, f in trio.items()}
    assert geometry(split, "a").equals(table)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert geometry(split, "a").equals(table)
    monkeypatch.setattr("domain_adapt.geometry.PART", 100)
    pd.testing.assert_frame_equal(geometry(trio, "a"), table, rtol=1e-6)
    assert same_weights(trio["a"], split["a"]) and not same_weights(trio["a"], split["b"])


FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-30, -1e-30, 1e5, 3.14])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=6), st.sampled_from([2.0 ** -9, 1.0, 2.0 ** 9]))
def test_swapping_scaling_and_models_that_do_not_move(tmp_path_factory, entries, scale):
    at = tmp_path_factory.mktemp("hypothesis")
    def saved(name, values, factor=1.0):
        (at / name).mkdir()
        save_file({"model.norm.weight": torch.tensor(values) * factor}, at / name / "model.safetensors")
        return at / name
    o, x, y = zip(*entries)
    models = {"o": saved("o", o), "x": saved("x", x), "y": saved("y", y), "same": saved("same", x)}
    column = "cosine_of_weights cosine_of_task_vectors sign_conflict sign_conflict_weighted slerp_is_linear".split()
    def pair(p, q):
        t = geometry({m: models[m] for m in ("o", p, q)}, "o")
        return t[(t.model == p) & (t.against == q) & (t.module == "all")].iloc[0]
    one, other, same = pair("x", "y"), pair("y", "x"), pair("x", "same")
    np.testing.assert_allclose(one[column].astype(float), other[column].astype(float), rtol=1e-9, atol=1e-12)
    if one.task_vector_norm > 0 and other.task_vector_norm > 0: assert one.norm_ratio == pytest.approx(1 / other.norm_ratio)
    if one.sign_conflict > 0: assert one.elections_won + other.elections_won == pytest.approx(1)
    else: assert np.isnan(one.elections_won) and np.isnan(other.elections_won)
    assert same.distance == 0 and same.slerp_distance == 0 and not same.sign_conflict > 0
    if same.task_vector_norm > 0: assert same.cosine_of_task_vectors == pytest.approx(1) and same.norm_ratio == 1
    else: assert np.isnan([same.cosine_of_task_vectors, same.norm_ratio, same.sign_conflict]).all()
    models = {m: saved(f"{m}2", v, scale) for m, v in zip("oxy", (o, x, y))}
    column += ["relative_norm", "norm_ratio", "elections_won"]
    np.testing.assert_allclose(pair("x", "y")[column].astype(float), one[column].astype(float), rtol=1e-5, atol=1e-9)


def test_no_more_than_a_part_of_a_model_stays_in_memory(tmp_path):
    "Peak memory grows by far less than one of the two models (200 MB each)."
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({f"layers.{i}.mlp.w": torch.full((1000, 1000), 1.0 + (name == "b")) for i in range(50)},
                  tmp_path / name / "model.safetensors")
    code = ("import resource, sys; from domain_adapt.geometry import geometry\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); geometry({'a': sys.argv[1], 'b': sys.argv[2]}, 'a'); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000


def test_a_pickle_is_not_read(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").rename(tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"): Weights(tmp_path / "p")


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["truncated shard", "missing shard", "index that is no JSON"])
def test_damaged_weights_are_named(tiny_llama, tmp_path, damage):
    folder = sharded(tiny_llama, tmp_path / "m")
    shard = folder / "model-00002-of-00002.safetensors"
    if damage == "truncated shard": shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing shard": shard.unlink()
    else: (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=str(folder)): Weights(folder)
