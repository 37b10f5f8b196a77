"""The timers of the benchmarks: what is captured, flushed and measured, on a stand-in for torch.cuda."""

from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch

from bench.decode import timing

THREES = torch.full((4,), 3.0)


def stand_in():
    """For torch.cuda; mock_calls tells what happened in what order."""
    cuda = MagicMock()
    cuda.get_device_properties.return_value.L2_cache_size = 1024
    return cuda


@pytest.mark.parametrize("replayed", [True, False])
def test_a_run_is_warmed_up_on_a_stream_of_its_own_then_captured_once_and_replayed(replayed):
    """What is checked is what the replay wrote."""
    cuda, result = stand_in(), torch.zeros(4)
    cuda.run.side_effect = lambda: result.fill_(3.0)
    cuda.CUDAGraph().replay.side_effect = lambda: replayed and result.fill_(3.0)
    clock = timing.GraphClock("cpu", cuda)
    cuda.reset_mock()
    prepared = clock.prepare(cuda.run)
    ends = ("run", "replay", "wait_stream", "empty_cache", "__enter__", "__exit__")
    assert [name for name, *_ in cuda.mock_calls if name.rpartition(".")[2] in ends] == [
        "Stream().wait_stream", "stream().__enter__", "run", "run", "stream().__exit__", "current_stream().wait_stream",
        "empty_cache", "graph().__enter__", "run", "graph().__exit__", "CUDAGraph().replay",
    ]  # fmt: skip
    assert cuda.stream.call_args == call(cuda.Stream()) and cuda.graph.call_args == call(cuda.CUDAGraph())
    if replayed:
        assert timing.gate(prepared.result * 1.001, THREES, 1e-2) == pytest.approx(1e-3, rel=1e-3)
    else:
        with pytest.raises(timing.WrongResult):
            timing.gate(prepared.result, THREES, 1e-2)


def test_rounds_are_interleaved_flushed_and_timed_between_events():
    """No provider always follows the same."""
    cuda, log, now = stand_in(), [], 0.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = now

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return (end.at - self.at) / 1e3

    def taking(name, microseconds):
        def run():
            nonlocal now
            log.append(name)
            now += microseconds

        return run

    cuda.Event, cuda.synchronize = Event, taking("synchronize", 0.0)
    clock = timing.GraphClock("cpu", cuda)
    assert clock.other.nbytes == 2 * 1024  # larger than the cache that it flushes
    clock.other = SimpleNamespace(amax=taking("flush", 1000.0))
    taken = {"a": 5.0, "b": 70.0, "c": 3.0}
    times = clock.microseconds({name: taking(name, us) for name, us in taken.items()}, 4)
    timed = [event for name in "abcbcacababc" for event in ("flush", "record", name, "record")]
    assert log == [*timed, "synchronize"]  # the host waits once, at the end
    assert times == {name: pytest.approx([us] * 4) for name, us in taken.items()}


@pytest.mark.parametrize("seconds, expected", [(2.0, 10), (0.1, 3), (60.0, 40)])
def test_as_many_rounds_as_fit_the_time(monkeypatch, seconds, expected):
    """A round takes a fifth of a second."""
    asked = []

    def microseconds(replays, rounds):
        asked.append(rounds)
        return {name: [1.0, 2.0, 3.0] for name in replays}

    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.2 * sum(asked))
    run = timing.Prepared(lambda: None, torch.zeros(1), torch.empty)
    found = timing.microseconds(SimpleNamespace(microseconds=microseconds), {"a": run}, seconds, (3, 40))
    assert found["a"]["median_us"] == 2.0 and asked == [1, expected]


def test_the_copy_rate_counts_what_is_read_and_written(monkeypatch):
    clock = timing.WallClock()
    monkeypatch.setattr(clock, "microseconds", lambda replays, rounds: {name: [50.0] * 3 for name in replays})
    assert timing.copy_rate(clock, torch.device("cpu"), 1 << 20) == pytest.approx(2 * (1 << 20) / 50e-6 / 1e9)
