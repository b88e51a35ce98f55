"Schedules against megatron-core's own, and at their edges."
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from domain_adapt.params import Train
from domain_adapt.schedule import DECAYS, learning_rate, phases


def rates(train: Train) -> list[float]: return [learning_rate(s, train) for s in range(1, train.steps + 1)]


def megatron_rates(train: Train) -> list[float]:
    "What megatron-core's OptimizerParamScheduler sets for updates 1 ... steps."
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    group, style = {}, {"sqrt": "minus_sqrt"}.get(train.decay.style, train.decay.style)
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=0.0, max_lr=train.lr, min_lr=train.min_lr, lr_warmup_steps=train.warmup,
        lr_decay_steps=train.steps, lr_decay_style="WSD" if train.schedule == "wsd" else train.schedule,
        start_wd=0.1, end_wd=0.1, wd_incr_steps=0, wd_incr_style="constant",
        wsd_decay_steps=train.steps - phases(train)[1], lr_wsd_decay_style=style)
    given = []
    for _ in range(train.steps):
        scheduler.step(1)
        given.append(group["lr"])
    return given


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("warmup, steps, low", [(5, 40, 2e-5), (0, 7, 0.0), (1, 2, 1e-4), (100, 3500, 1.5e-6)])
def test_equals_megatron(kind, warmup, steps, low):
    train = Train(steps=steps, warmup=warmup, lr=2e-4, min_lr=low, schedule=kind)
    assert rates(train) == pytest.approx(megatron_rates(train), rel=1e-12, abs=1e-18)


@pytest.mark.oracle
@pytest.mark.parametrize("style", DECAYS)
@pytest.mark.parametrize("warmup, steps, low, share", [(5, 40, 2e-5, .2), (0, 7, 0.0, 1.0), (1, 2, 1e-4, .5), (100, 3500, 1.5e-6, .11)])
def test_wsd_equals_megatron(style, warmup, steps, low, share):
    train = Train(steps=steps, warmup=warmup, lr=2e-4, min_lr=low, schedule="wsd", decay=dict(style=style, share=share))
    assert rates(train) == pytest.approx(megatron_rates(train), rel=1e-12, abs=1e-18)


def test_infinite_is_its_formula():
    "Warm-up 10, cool-down to 110, constant to 160, anneal to 200, worked out by hand at the quarters."
    t = Train(steps=200, warmup=10, lr=4e-4, min_lr=1e-5, schedule="infinite", decay=dict(constant_lr=1e-4, cooldown=.5, share=.2))
    for step, rate in {1: 4e-5, 10: 4e-4, 60: 2.5e-4, 85: 1e-4 + 1.5e-4 * (1 - math.sqrt(.5)), 110: 1e-4, 160: 1e-4,
                       170: 1e-4 * .1 ** .25, 180: 1e-4 * .1 ** .5, 200: 1e-5}.items():
        assert learning_rate(step, t) == pytest.approx(rate, rel=1e-12), step


@st.composite
def trains(draw, **fixed) -> Train:
    "Any schedule whose phases fit."
    steps = draw(st.integers(2, 400))
    warm = draw(st.integers(0, steps - 1))
    room = 1 - warm / steps
    share = draw(st.floats(.001, 1)) * room
    cooldown = max(0.0, (room - share) * draw(st.floats(0, .999)))
    low, constant = sorted([draw(st.floats(1e-6, 1)), draw(st.floats(1e-6, 1))])
    return Train(steps=steps, warmup=warm, lr=1.0, min_lr=low, **({"schedule": draw(st.sampled_from(["cosine", "wsd", "infinite"]))} | fixed),
                 decay=dict(style=draw(st.sampled_from(list(DECAYS))), share=share * .999, cooldown=cooldown, constant_lr=constant))


@given(trains())
def test_between_min_lr_and_lr_never_up_again_and_ends_at_min_lr(train):
    r = rates(train)
    after = r[max(0, train.warmup - 1):]
    assert all(0 < x <= 1 + 1e-12 for x in r)
    assert all(x >= train.min_lr - 1e-12 for x in after)
    assert all(b <= a + 1e-12 for a, b in zip(after, after[1:]))
    assert math.isclose(r[-1], train.min_lr, rel_tol=1e-9)
    no_room = train.schedule == "infinite" and phases(train)[0] <= train.warmup    # the cool-down rounds to no step
    assert train.warmup < 1 or no_room or r[train.warmup - 1] == pytest.approx(1.0)


@given(trains(schedule="wsd"))
def test_wsd_stays_at_lr_until_its_decay(train):
    start = phases(train)[1]
    assert train.warmup <= start < train.steps
    assert all(learning_rate(s, train) == pytest.approx(1.0) for s in range(max(1, train.warmup), start + 1))


@given(st.integers(100, 1000), st.floats(.2, .4), st.floats(.2, .4), st.sampled_from(["cosine", "wsd", "infinite"]),
       st.sampled_from(["linear", "cosine", "exponential"]))
def test_no_step_jumps(steps, share, cooldown, kind, style):
    "At joints, too, one step changes the rate by no more than the steepest phase allows: π/2 times its mean slope."
    t = Train(steps=steps, warmup=steps // 10, lr=1.0, min_lr=.1, schedule=kind, decay=dict(style=style, share=share, cooldown=cooldown, constant_lr=.5))
    r = [0.0, *rates(t)]
    shortest = min(t.warmup, round(share * steps), round(cooldown * steps))
    assert max(abs(b - a) for a, b in zip(r, r[1:])) <= 1.6 / shortest


@given(trains(), st.integers(1, 400))
def test_a_rate_depends_on_its_step_alone(train, step):
    step = min(step, train.steps)
    assert learning_rate(step, train) == rates(train)[step - 1]
