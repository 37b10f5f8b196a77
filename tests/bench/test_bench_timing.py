"""The timers of the benchmarks: what is captured, flushed and measured, on a stand-in for torch.cuda."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench.decode import timing


class Cuda:
    """Stands for torch.cuda. A replay takes as long as its graph says; what happens is written down."""

    def __init__(self):
        self.log, self.now, self.capturing, self.streams = [], 0.0, None, ["default"]

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1024)

    def current_stream(self):
        return self.Stream.named(self.streams[-1])

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream.name)
        yield
        self.streams.pop()

    @contextmanager
    def graph(self, graph):
        self.capturing = graph
        yield
        self.capturing = None

    class Stream:
        def __init__(self):
            self.name, self.waits = "side", []

        @classmethod
        def named(cls, name):
            stream = cls()
            stream.name = name
            return stream

        def wait_stream(self, other):
            self.waits.append(other.name)

    def CUDAGraph(self):
        return Graph(self)

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)

    def synchronize(self):
        self.log.append("synchronize")

    def empty_cache(self):
        assert self.capturing is None


class Graph:
    def __init__(self, cuda):
        self.cuda, self.body, self.microseconds = cuda, lambda: None, 0.0

    def replay(self):
        self.cuda.log.append("replay")
        self.cuda.now += self.microseconds
        self.body()


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.log.append("record")
        self.at = self.cuda.now

    def elapsed_time(self, end):
        assert self.cuda.log[-1] == "synchronize"
        return (end.at - self.at) / 1e3


class Flush:
    """Stands for the buffer that is read to flush the L2 cache."""

    def __init__(self, cuda):
        self.cuda = cuda

    def amax(self):
        self.cuda.log.append("flush")
        self.cuda.now += 1000.0


def run_on(cuda, microseconds=0.0, replayed=True):
    """A run that writes 3 into its result, where it is captured as well as where it is replayed."""
    result = torch.zeros(4)

    def run():
        cuda.log.append(f"run on {cuda.streams[-1]}")
        if cuda.capturing is not None:
            cuda.capturing.microseconds = microseconds
            cuda.capturing.body = (lambda: result.fill_(3.0)) if replayed else (lambda: None)
        return result.fill_(3.0)

    return run


def test_a_run_is_warmed_up_on_a_stream_of_its_own_then_captured_once():
    cuda = Cuda()
    prepared = timing.GraphClock("cpu", cuda).prepare(run_on(cuda))
    assert cuda.log == ["run on side", "run on side", "run on default", "replay"]
    assert torch.equal(prepared.result, torch.full((4,), 3.0))


def test_a_graph_that_writes_nothing_does_not_pass_the_gate():
    cuda = Cuda()
    prepared = timing.GraphClock("cpu", cuda).prepare(run_on(cuda, replayed=False))
    with pytest.raises(timing.WrongResult):
        timing.gate(prepared.result, torch.full((4,), 3.0), 1e-2)


def test_the_flushed_buffer_is_larger_than_the_cache():
    other = timing.GraphClock("cpu", Cuda()).other
    assert other.numel() * other.itemsize == 2 * 1024


def test_rounds_are_interleaved_flushed_and_timed_between_events():
    cuda = Cuda()
    clock = timing.GraphClock("cpu", cuda)
    clock.other = Flush(cuda)
    replays = {name: clock.prepare(run_on(cuda, us)).replay for name, us in (("a", 5.0), ("b", 70.0))}
    cuda.log.clear()
    times = clock.microseconds(replays, 3)
    assert cuda.log == ["flush", "record", "replay", "record"] * 6 + ["synchronize"]  # the host waits once, at the end
    assert times == {"a": pytest.approx([5.0] * 3), "b": pytest.approx([70.0] * 3)}


def test_no_provider_always_follows_the_same():
    assert timing.rotations(["a", "b", "c"], 4) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


class Slow(timing.WallClock):
    """Counts rounds; each takes a fifth of a second by the clock given."""

    def __init__(self, monkeypatch):
        self.rounds, self.now = [], 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def microseconds(self, replays, rounds):
        self.rounds.append(rounds)
        self.now += 0.2 * rounds
        return {name: [1.0, 2.0, 3.0] for name in replays}


@pytest.mark.parametrize("seconds, rounds, expected", [(2.0, (3, 40), 10), (0.1, (3, 40), 3), (60.0, (3, 40), 40)])
def test_as_many_rounds_as_fit_the_time(monkeypatch, seconds, rounds, expected):
    clock = Slow(monkeypatch)
    run = timing.Prepared(lambda: None, torch.zeros(1), torch.empty)
    assert timing.microseconds(clock, {"a": run}, seconds, rounds)["a"]["median_us"] == 2.0
    assert clock.rounds == [1, expected]


def test_a_wrong_result_is_named_with_its_error():
    good = torch.ones(8)
    assert timing.gate(good * 1.001, good, 1e-2) == pytest.approx(1e-3, rel=1e-3)
    for bad in (good * 1.1, torch.full((8,), torch.nan)):
        with pytest.raises(timing.WrongResult, match="not timed"):
            timing.gate(bad, good, 1e-2)


def test_the_copy_rate_counts_what_is_read_and_written(monkeypatch):
    clock = timing.WallClock()
    monkeypatch.setattr(clock, "microseconds", lambda replays, rounds: {name: [50.0] * 3 for name in replays})
    assert timing.copy_rate(clock, torch.device("cpu"), 1 << 20) == pytest.approx(2 * (1 << 20) / 50e-6 / 1e9)
