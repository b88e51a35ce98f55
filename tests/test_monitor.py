"What is seen of a training: spikes, files, Prometheus, TensorBoard, the dashboard."
import json
import math
import os
import re
import socket
import statistics
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain_adapt.monitor import ENOUGH, GAUGES, Endpoint, Guard, Monitor
from domain_adapt.params import Guard as Settings
from domain_adapt.params import load_params
from domain_adapt.runs import read_lines

ROOT = Path(__file__).resolve().parent.parent
LLAMA = dict(model_type="llama", num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=128, max_position_embeddings=512)
steps = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.01, 100)), max_size=60)


def params(*more: str): return load_params(ROOT / "params" / "tiny.yaml", more)


def free() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@given(steps, st.floats(0.1, 50), st.floats(0.01, 5000))
def test_a_spike_is_what_its_sentence_says(history, loss, norm):
    guard = Guard(Settings(loss=2, grad_norm=10, window=20))
    for x in history: guard.learnt(*x)
    last = history[-20:]
    enough = len(last) >= ENOUGH
    over = [enough and v > times * statistics.median(x[i] for x in last) for i, (v, times) in enumerate(((loss, 2), (norm, 10)))]
    found = guard.spike(loss, norm)
    assert bool(found) == any(over) and (not found or found.what == ("loss" if over[0] else "grad_norm"))


@given(steps, st.integers(0, 60))
def test_a_guard_restored_decides_as_the_one_before_it(history, cut):
    one, two = (Guard(Settings(loss=1.2, grad_norm=2, window=15)) for _ in range(2))
    said = []
    for x in history:
        said.append(one.spike(*x))
        one.learnt(*x)
    two.restore(history[:cut])
    for x, was in list(zip(history, said))[cut:]:
        assert two.spike(*x) == was
        two.learnt(*x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_spike_at_once(bad):
    assert Guard(Settings()).spike(bad, 1.0).what == "loss" and Guard(Settings()).spike(1.0, bad).what == "grad_norm"


def monitor(out: Path, *more: str) -> Monitor:
    made = Monitor(out, params(*more), LLAMA, "fp32")
    return made


def test_lines_after_the_step_gone_on_from_are_forgotten_and_events_stay(tmp_path):
    first = monitor(tmp_path)
    first.go_on(0)
    for step in range(1, 9): first.write(step=step, loss=1 / 3 + step, grad_norm=0.1, learnt=step != 2)
    first.event(5, "loss", math.nan, "rolled back")
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f: f.write('{"step": 9, "lo')    # a crash
    again = monitor(tmp_path)
    assert again.go_on(6) == ({2}, {5}, [(1 / 3 + s, 0.1) for s in (1, 3, 4, 5, 6)])
    again.write(step=7, loss=math.inf, grad_norm=1.0)
    again.close()
    table = pd.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert list(table["step"]) == list(range(1, 8)) and math.isnan(table["loss"].iloc[-1])
    event, = read_lines(tmp_path / "events.jsonl")
    assert {k: event[k] for k in ("step", "what", "value", "action")} == dict(step=5, what="loss", value="nan", action="rolled back")


@pytest.mark.fault
@pytest.mark.parametrize("torn", [b'{"step": 7, "wh', b"\0" * 40, b"{"], ids=["half", "zeros", "brace"])
def test_half_a_line_of_events_hides_none_of_those_after_it(tmp_path, torn, monkeypatch):
    monkeypatch.setattr("domain_adapt.monitor.cpu_peak", lambda precision: 1.0)
    first = monitor(tmp_path)
    first.event(5, "loss", 9.0, "rolled back")
    for step in (8, 9):
        with (tmp_path / "events.jsonl").open("ab") as f: f.write(torn)    # a crash
        monitor(tmp_path).event(step, "loss", 9.0, "rolled back")
    assert monitor(tmp_path).go_on(0)[1] == {5, 8, 9}
    assert [e["step"] for e in read_lines(tmp_path / "events.jsonl")] == [5, 8, 9]


@pytest.mark.fault
def test_every_line_is_on_disk_when_training_goes_on(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), synced.append((os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size))))
    made = monitor(tmp_path)
    made.go_on(0)
    for step in (1, 2):
        made.write(step=step, loss=1.0)
        made.event(step, "loss", 1.0, "skipped")
        for name in ("metrics.jsonl", "events.jsonl"):
            assert (str(tmp_path / name), (tmp_path / name).stat().st_size) in synced
    made.close()


def test_prometheus_sees_the_first_skip_as_an_increase():
    endpoint = Endpoint(port := free(), "x")
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    endpoint.close()
    assert 'domain_adapt_events_total{action="skipped",run="x"} 0.0' in page


@pytest.mark.oracle
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    one = monitor(tmp_path)
    one.go_on(0)
    for step in (1, 2, 3): one.write(**{"step": step, "loss": 4.0 - step, "grad_norm": 1.0, "learnt": True, "heldout/sec": 2.5})
    one.close()
    two = monitor(tmp_path)
    two.go_on(2)
    two.write(step=3, loss=7.0)
    two.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 7.0)]
    assert [e.value for e in read.Scalars("heldout/sec")][:2] == [2.5, 2.5]


@pytest.mark.oracle
def test_prometheus_reads_the_page(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families
    port = free()
    made = monitor(tmp_path, f"train.metrics_port={port}")
    made.go_on(0)
    made.write(**{"step": 4, "tokens": 2048, "loss": 2.25, "lr": 1e-4, "learnt": True, "heldout/sec": 3.5}, **made.speed(2048, 0.5))
    made.event(4, "loss", 9.0, "skipped")
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    made.close()
    found = {(s.name, *sorted(s.labels.items())): s.value for family in text_string_to_metric_families(page) for s in family.samples}
    run = ("run", "tiny")
    assert found["domain_adapt_loss", run] == 2.25 and found["domain_adapt_tokens_per_second", run] == 4096
    assert found["domain_adapt_heldout_loss", ("corpus", "sec"), run] == 3.5
    assert found["domain_adapt_events_total", ("action", "skipped"), run] == 1
    assert str(tmp_path) not in page


@pytest.mark.fault
def test_a_port_that_is_taken_ends_nothing_and_is_written_down(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = monitor(tmp_path, f"train.metrics_port={port}")
    made.go_on(0)
    made.write(step=1, loss=1.0)
    made.close()
    event, = read_lines(tmp_path / "events.jsonl")
    assert str(port) in event["what"] and event["action"] == "not served"


def test_the_dashboard_asks_only_for_what_is_served():
    board = json.loads((ROOT / "domain_adapt" / "grafana.json").read_text())
    names = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"domain_adapt_\w+", t["expr"])}
    endpoint = Endpoint(port := free(), "x")
    endpoint.set({name: 1.0 for name in GAUGES} | {"heldout/a": 1.0})
    endpoint.events.labels("x", "skipped").inc()
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    endpoint.close()
    served = {re.match(r"\w+", line)[0] for line in page.splitlines() if not line.startswith("#")}
    assert names <= served and served - names <= {"domain_adapt_events_created"}
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"]) and all(p["title"] for p in board["panels"])


def test_utilisation_is_work_over_peak(tmp_path):
    made = monitor(tmp_path)
    made.peak["tflops"] = 2.0
    told = made.speed(1000, 0.25)
    n = 128 * 32 * 2 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32    # untied embeddings
    assert told["mfu"] == pytest.approx(1000 * 6 * n / 0.25 / 2e12) and told["memory_bytes"] > 2**20 and os.getpid()
