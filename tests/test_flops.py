"Parameters and operations against what the Hub and NVIDIA publish."
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from domain_adapt.flops import Shape, flops_per_token, mfu, parameters, shape_of
from domain_adapt.plan import published
from domain_adapt.runs import PACKAGE

ARCHITECTURES = yaml.safe_load((PACKAGE / "architectures.yaml").read_text())


@pytest.mark.oracle
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_shapes_have_the_parameters_that_the_hub_counts(name):
    assert parameters(shape_of(ARCHITECTURES[name]["config"]))["total"] == ARCHITECTURES[name]["parameters"]


def test_no_model_is_listed_twice():
    assert len(published()) == sum(1 + len(a.get("same", ())) for a in ARCHITECTURES.values())


@pytest.mark.oracle
@pytest.mark.parametrize("name, tokens, tflops", [("meta-llama/Meta-Llama-3-70B", 1602, 719), ("meta-llama/Meta-Llama-3-8B", 14451, 744)])
def test_operations_with_attention_are_nvidias(name, tokens, tflops):
    "Megatron-Bridge 25.11 on H100: tokens and TFLOP a second and GPU, sequences of 8,192."
    assert tokens * flops_per_token(shape_of(published()[name]), 8192) == pytest.approx(tflops * 1e12, rel=2e-3)


@pytest.mark.oracle
@pytest.mark.parametrize("tied, bias", [(False, False), (True, True)])
def test_parameters_are_those_of_transformers(tied, bias):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model("qwen2" if bias else "llama", hidden_size=48, intermediate_size=112, num_hidden_layers=3, vocab_size=101,
                                  num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64)
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
    assert parameters(shape_of(config.to_dict()))["total"] == model.num_parameters()


SHAPES = st.builds(Shape, *[st.integers(1, 64)] * 8, st.booleans(), st.booleans())


@given(SHAPES, st.integers(1, 10**6))
def test_the_two_counts_differ_by_embedding_and_attention(shape, length):
    count = parameters(shape)
    gap = 6 * (shape.layers * length * shape.heads * shape.head_dim - (0 if shape.tied else count["embedding"]))
    assert flops_per_token(shape, length) - flops_per_token(shape) == pytest.approx(gap)


def test_the_papers_month_on_128_and_on_32_gpus():
    "70B parameters x 70B tokens in 31 days, in TFLOP/s of a GPU and of an H100's bf16 peak."
    per_token, month = flops_per_token(shape_of(published()["meta-llama/Meta-Llama-3-70B"])), 31 * 86400
    assert [round(mfu(70e9, month, gpus, 1, per_token)) for gpus in (128, 32)] == [86, 346]
    assert [round(mfu(70e9, month, gpus, 989.4, per_token), 3) for gpus in (128, 32)] == [0.087, 0.349]
    published_speeds = (652, 829, 1602, 1664)    # tokens/s and H100: torchtitan bf16 and FP8, Megatron-Bridge FP8
    slowest, fastest = min(published_speeds), max(published_speeds)
    assert slowest < 70e9 / month / 32 < fastest and 70e9 / month / 128 < slowest / 3


def test_it_imports_neither_torch_nor_pandas():
    code = "import sys, domain_adapt.flops, domain_adapt.plan; assert not {'torch', 'pandas', 'numpy', 'transformers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
