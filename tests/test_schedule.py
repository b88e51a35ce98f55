"Schedules against megatron-core's own, and at their edges."
import math

import pytest
from hypothesis import given, strategies as st

from domain_adapt.params import Train
from domain_adapt.schedule import learning_rate


def megatron_rates(train: Train) -> list[float]:
    "What megatron-core's OptimizerParamScheduler sets for updates 1 ... steps."
    from types import SimpleNamespace
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    group = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=0.0, max_lr=train.lr, min_lr=train.min_lr, lr_warmup_steps=train.warmup,
        lr_decay_steps=train.steps, lr_decay_style=train.schedule, start_wd=0.1, end_wd=0.1, wd_incr_steps=0, wd_incr_style="constant")
    rates = []
    for _ in range(train.steps):
        scheduler.step(1)
        rates.append(group["lr"])
    return rates


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("warmup, steps, low", [(5, 40, 2e-5), (0, 7, 0.0), (1, 2, 1e-4), (100, 3500, 1.5e-6)])
def test_equals_megatron(kind, warmup, steps, low):
    train = Train(steps=steps, warmup=warmup, lr=2e-4, min_lr=low, schedule=kind, export_at=[1.0])
    ours = [learning_rate(s, train) for s in range(1, steps + 1)]
    assert ours == pytest.approx(megatron_rates(train), rel=1e-12, abs=1e-18)


@given(steps=st.integers(2, 500), share=st.floats(0, 0.99), low=st.floats(0, 1))
def test_between_zero_and_lr_and_ends_at_min_lr(steps, share, low):
    train = Train(steps=steps, warmup=int(share * steps), lr=1.0, min_lr=low)
    rates = [learning_rate(s, train) for s in range(1, steps + 1)]
    assert all(0 < r <= 1 + 1e-12 or (low == 0 and s == steps - 1) for s, r in enumerate(rates))
    assert math.isclose(rates[-1], low, abs_tol=1e-15)
    assert max(rates) == pytest.approx(1.0) or train.warmup == 0
