"""Task vectors: figures against numpy, and weights wherever they lie."""
import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from domain_adapt.geometry import Weights, geometry, place, same_weights
from domain_adapt.params import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory, make_model):
    at = tmp_path_factory.mktemp("geometry")
    for seed, name in enumerate(("a", "b")): make_model(at / name, seed=seed)
    return at / "a", at / "b"


def sharded(folder, to):
    "The same model with every tensor in one of two files, as large models are stored."
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    files = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(tensors))}
    for file in set(files.values()): save_file({k: tensors[k] for k in files if files[k] == file}, to / file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return to


@pytest.mark.oracle
def test_figures_are_numpys(pair):
    a, b = (load_file(f / "model.safetensors") for f in pair)
    table = geometry(*pair).set_index("module")
    modules = {place(k)[0] for k in Weights(pair[0])}
    assert set(table.index) == modules and {"embed_tokens", "norm", "layers.1.attention"} <= modules
    for module, row in table.iterrows():
        names = sorted(k for k in a if place(k)[0] == module)
        x, y = (np.concatenate([t[k].numpy().astype("f8").ravel() for k in names]) for t in (a, b))
        assert row.parameters == len(x)
        assert row.task_vector_norm == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
        assert row.relative_norm == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        assert row.cosine_of_weights == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


@pytest.mark.equality
def test_shards_and_other_types_give_the_same_table(pair, tmp_path):
    a, b = pair
    assert geometry(a, b).equals(geometry(sharded(a, tmp_path / "a"), sharded(b, tmp_path / "b")))
    assert same_weights(a, tmp_path / "a") and not same_weights(a, tmp_path / "b")


def test_a_pickle_is_not_read(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").rename(tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"): Weights(tmp_path / "p")


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["truncated shard", "missing shard", "index that is no JSON"])
def test_damaged_weights_are_named(pair, tmp_path, damage):
    folder = sharded(pair[0], tmp_path / "m")
    shard = folder / "model-00002-of-00002.safetensors"
    if damage == "truncated shard": shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing shard": shard.unlink()
    else: (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=str(folder)): Weights(folder)
