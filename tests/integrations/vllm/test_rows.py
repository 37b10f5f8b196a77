"""Rows of the dense window, without an engine: whose tokens they hold, whatever is scheduled."""

import pytest

pytest.importorskip("vllm")

import torch
from engine_play import Play
from engine_stubs import REQUESTS, SIZE, Step, passed, stub
from test_layer import heads, layer_of

from lrattn.integrations.vllm import layer as integration
from lrattn.integrations.vllm.window import REPLAY, STORED

pytestmark = pytest.mark.vllm

PLAYS = {  # the dense window, drafts, whether requests have numbers
    "rows by pages": ((4, 2), 0, False),
    "numbers": ((4, 2), 0, True),
    "drafts": ((8, 3), 2, False),
    "drafts, numbers": ((8, 3), 2, True),
    "wide": ((16, 4), 1, False),
    "no recent ones": ((0, 4), 0, False),
    "no recent ones, numbers": ((0, 4), 0, True),
    "no first ones": ((6, 0), 0, True),
}


@pytest.mark.parametrize("name", PLAYS)
@torch.no_grad()
def test_rows_and_pages_hold_what_they_should_whatever_is_scheduled(name, monkeypatch):
    monkeypatch.setattr(integration.prefill, "attend", lambda *_: None)
    monkeypatch.setattr(integration.LatentImpl, "_decode", lambda *_: None)
    play = Play(layer_of("chunks"), *PLAYS[name], seed=3)
    while play.seen["steps"] < 250:
        play.step()
    assert play.seen["hits"] > 10 and play.seen["hits of this step"] and play.seen["preempted"], play.seen
    assert play.seen["rebuilt"] and (play.seen["first"] > 10 or not play.near[1]), play.seen


def kept(batch):
    """Whether every request has the row that it had."""
    return batch.came is None or not batch.came.missing.any()


@pytest.mark.parametrize("number, prefills", [(0, True), (None, True), (None, False)])
def test_a_row_of_as_many_tokens_is_not_taken_where_their_page_is_now_another_s(number, prefills):
    owner, builder = stub(layer_of("chunks"), (4, 2))
    begin, other = SIZE - REPLAY * 4, number if number is None else 1
    passed(owner, builder, [Step([1], 0, begin, number=number)], heads(begin))
    passed(owner, builder, [Step([1, 2], 0, 32, number=other)], heads(32, 1))
    n = 20 if prefills else 1
    passed(owner, builder, [Step([1, 3], begin, n, prefills, number)], heads(n, 2))
    batch = builder.engine.batch
    assert batch.came.missing.tolist() == [True] and set(batch.slots[: SIZE - begin].tolist()) == {-1}


def test_a_row_is_of_who_wrote_to_the_page_last():
    owner, builder = stub(layer_of("chunks"), (4, 2))
    for page in 1, 1, 5, 6, 1:  # the last one has the first one's row
        passed(owner, builder, [Step([page, page + 1], 0, 20)], heads(20))
    passed(owner, builder, [Step([1, 2], 20, 1, False)], heads(1))
    assert builder.engine.batch.rows.tolist() == [0] and kept(builder.engine.batch)


def test_a_row_that_might_have_had_drafts_stands_for_a_shorter_request():
    """Both have all of the first page; what comes next is written."""
    owner, builder = stub(layer_of("chunks"), (4, 2), 2)
    passed(owner, builder, [Step([1], 8, 8), Step([1, 2], 0, 17)], heads(25))
    passed(owner, builder, [Step([1, 3], 16, 5), Step([1, 2], 17, 5)], heads(10))
    batch = builder.engine.batch
    assert kept(batch) and min(batch.slots.tolist()) >= 0


def test_two_requests_that_were_one_have_a_row_each():
    owner, builder = stub(layer_of("chunks"), (16, 2))
    begun, more = heads(8), heads(30, 1)
    passed(owner, builder, [Step([1], 0, 8)], begun)
    passed(owner, builder, [Step([1, 2], 8, 2), Step([1, 3], 8, 28)], more)
    batch, window = builder.engine.batch, owner.impl.window
    short, long = batch.rows.tolist()
    at = window.place(torch.arange(10))
    assert short != long and batch.twins and kept(batch)
    for got, old, new in zip(window.both[:, short, at], begun[1:], more[1:]):
        assert torch.equal(got, torch.cat((old, new[:2])))
    at = window.place(torch.arange(2)), window.place(torch.arange(20, 36))
    for got, old, new in zip(window.both[:, long], begun[1:], more[1:]):
        assert torch.equal(got[at[0]], old[:2]) and torch.equal(got[at[1]], new[14:])


def test_first_tokens_are_of_the_page_s_own_prefix():
    """Of the last prefixes stored; not of one that came in the place of another, nor of one whose page was given on."""
    owner, builder = stub(layer_of("chunks"), (0, 2))
    given = [heads(16, page) for page in range(STORED * REQUESTS + 2)]

    def homes(page):
        passed(owner, builder, [Step([page, 30], 16, 4, number=1)], heads(4))
        return builder.engine.batch.came.homes.tolist()

    for page in range(1, STORED * REQUESTS + 2):
        passed(owner, builder, [Step([page], 0, 16, number=0)], given[page])
    assert homes(1) == [-1] and homes(page) != [-1]
    for got, want in zip(owner.impl.window.both[:, 1, :2], given[page][1:]):
        assert torch.equal(got, want[:2])
    passed(owner, builder, [Step([page], 0, 1, number=0)], heads(1))
    passed(owner, builder, [Step([page], 1, 15, number=0)], heads(15))
    assert homes(page) == [-1]


def test_a_hit_on_pages_of_the_same_step_has_their_first_tokens():
    owner, builder = stub(layer_of("chunks"), (0, 2))
    given = heads(24)
    passed(owner, builder, [Step([1, 3], 16, 4, number=1), Step([1, 2], 0, 20, number=0)], given)
    for got, want in zip(owner.impl.window.both[:, 1, :2], given[1:]):
        assert torch.equal(got, want[4:6])


def test_many_tokens_behind_a_prompt_are_a_prefill():
    """As of a request that goes on after it was preempted, where vLLM's older model runner tells of its prompt only."""
    layer = layer_of("chunks")
    outs = []
    for prefills in True, False:
        made = stub(layer, (4, 2))
        passed(*made, [Step([1], 0, 5)], heads(5))
        outs.append(passed(*made, [Step([1, 2], 5, 20, prefills)], heads(20, 1)))
    assert torch.equal(*outs)
