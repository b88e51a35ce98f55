"HF to Megatron-Core and back: bit for bit, and nothing of a folder lost."
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from domain_adapt.convert import export_hf, join_qkv, split_qkv, to_hf, to_megatron, weights_dtype
from domain_adapt.params import UserError


def random_state(hf, dtype=torch.float32) -> dict[str, torch.Tensor]:
    "Weights of a Llama of these sizes."
    h, d, f = hf.hidden_size, hf.head_dim, hf.intermediate_size
    shapes = {"model.embed_tokens": (hf.vocab_size, h), "model.norm": (h,)}
    if not hf.tie_word_embeddings: shapes["lm_head"] = (hf.vocab_size, h)
    for i in range(hf.num_hidden_layers):
        at = f"model.layers.{i}."
        shapes |= {at + "self_attn.q_proj": (hf.num_attention_heads * d, h), at + "self_attn.k_proj": (hf.num_key_value_heads * d, h),
                   at + "self_attn.v_proj": (hf.num_key_value_heads * d, h), at + "self_attn.o_proj": (h, hf.num_attention_heads * d),
                   at + "mlp.gate_proj": (f, h), at + "mlp.up_proj": (f, h), at + "mlp.down_proj": (h, f),
                   at + "input_layernorm": (h,), at + "post_attention_layernorm": (h,)}
    return {f"{k}.weight": torch.randn(s).to(dtype) for k, s in shapes.items()}


@pytest.mark.equality
@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 4), per=st.integers(1, 4), d=st.integers(1, 5), layers=st.integers(1, 3), tied=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_there_and_back_bit_for_bit(groups, per, d, layers, tied, dtype):
    hf = SimpleNamespace(hidden_size=6, head_dim=d, intermediate_size=10, vocab_size=17, num_hidden_layers=layers,
                         num_attention_heads=groups * per, num_key_value_heads=groups, tie_word_embeddings=tied)
    state = random_state(hf, dtype)
    there = to_megatron(state, hf)
    back = to_hf(there, hf)
    assert there["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (groups * (per + 2) * d, 6)
    assert back.keys() == state.keys()
    for k, v in state.items(): assert back[k].dtype == v.dtype and torch.equal(back[k], v), k


def test_each_group_holds_its_queries_key_and_value():
    heads, groups, d = 4, 2, 3
    q, k, v = (torch.arange(n * d).view(-1, 1) + at for n, at in ((heads, 0), (groups, 100), (groups, 200)))
    rows = join_qkv(q, k, v, groups).view(groups, heads // groups + 2, d)
    assert rows[1].tolist() == [[6, 7, 8], [9, 10, 11], [103, 104, 105], [203, 204, 205]]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(join_qkv(q, k, v, groups), groups, heads), (q, k, v)))


def tiny(**kw):
    return SimpleNamespace(**{**dict(hidden_size=6, head_dim=2, intermediate_size=10, vocab_size=17, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True), **kw})


def test_a_missing_or_foreign_weight_is_named():
    state = random_state(tiny())
    with pytest.raises(UserError, match="self_attn.k_proj.bias"):
        to_megatron(state | {"model.layers.0.self_attn.k_proj.bias": torch.zeros(2)}, tiny())
    del state["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match="lack model.layers.0.mlp.up_proj.weight"): to_megatron(state, tiny())


@pytest.mark.equality
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_keeps_all_but_the_weights(tiny_llama, tmp_path, dtype):
    import shutil
    source, folder = tmp_path / "source", tmp_path / "export"
    shutil.copytree(tiny_llama, source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | {"dtype": dtype}))
    weights = {k: torch.randn_like(v) for k, v in load_file(source / "model.safetensors").items()}
    export_hf(weights, source, folder)
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()}
    for f in source.iterdir():
        if f.suffix != ".safetensors": assert (folder / f.name).read_bytes() == f.read_bytes(), f.name
    assert weights_dtype(folder) == getattr(torch, dtype)
    for k, v in load_file(folder / "model.safetensors").items(): assert torch.equal(v, weights[k].to(getattr(torch, dtype))), k
