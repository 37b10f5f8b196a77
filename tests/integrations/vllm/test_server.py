"""vLLM's OpenAI server over a tiny model: many clients, exact factors, a kill, and files that are not the model's."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import IncompleteRead

import pytest

pytest.importorskip("vllm")

import tiny
from latents import random_factors
from passes import exact_ropes
from serving import LATENT, Server
from transformers import AutoModelForCausalLM

from lrattn.integrations.vllm.source import FILE, KEY

pytestmark = pytest.mark.vllm
CLIENTS = 12


def prompts():
    """A dozen, as ids and as text, of which most share their first pages; and how many tokens to answer with."""
    ids = tiny.tokens(6, 150).tolist()
    shared = [ids[0][:96] + own[: 5 + 20 * i] for i, own in enumerate(ids)]
    text = "A page of latents holds the keys and values of thirty-two tokens, and nobody reads them twice. "
    texts = [text * 2 + end for end in ("Who?", "Why is that?", "")]
    found = [*shared, *texts, ids[1][:1], ids[2][:33], ids[3][:64]]
    return [(prompt, 16 + i % 5) for i, prompt in enumerate(found)]


def at_once(server):
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = clients.map(lambda asked: server.answer(*asked)["token_ids"], prompts())
        return list(answers)


def in_turn(server):
    """The last prompt first."""
    return [server.answer(*asked)["token_ids"] for asked in prompts()[::-1]][::-1]


def by(factors):
    return *LATENT, "--additional-config", json.dumps({KEY: str(factors)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of one, and itself."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def dense(model, tmp_path_factory):
    with Server(model[0], tmp_path_factory.mktemp("dense") / "log") as server:
        return in_turn(server.ready())


def test_exact_factors_give_the_tokens_of_a_dense_server(model, dense, tmp_path):
    """With a dense window, whose rows many requests take in turn, and behind prefixes that were read before."""
    folder, own = model
    random_factors(own, near=(16, 4), ropes=exact_ropes(own), chunk=64).save(tmp_path / "factors")
    with Server(folder, tmp_path / "log", *by(tmp_path / "factors")) as server:
        assert at_once(server.ready()) == dense
        assert at_once(server) == dense
        assert server.counted("prefix_cache_hits") >= 96 * 5


def test_answers_do_not_depend_on_other_clients_nor_on_the_server(model, dense, tmp_path):
    """Of latents that lose much: at once, one at a time, as text or ids; and by one that lies beside the model, after a
    kill amid answers."""
    folder, own = model
    factors = random_factors(own, 0.4, ropes=exact_ropes(own), chunk=64)
    factors.save(tmp_path / "factors")
    with Server(folder, tmp_path / "log", *by(tmp_path / "factors")) as server:
        want = at_once(server.ready())
        assert want != dense
        assert in_turn(server) == want
        text, tokens = prompts()[7]
        answer = server.answer(text, tokens)
        assert server.answer(answer["prompt_token_ids"], tokens) == answer
        with ExitStack() as open_ones:
            streams = [open_ones.enter_context(server.complete(p, 300, stream=True)) for p, _ in prompts()[:CLIENTS]]
            assert streams[0].readline().startswith(b"data: {")
            server.kill()
            assert not any(b"[DONE]" in rest(stream) for stream in streams)
    factors.save(folder / FILE)
    with Server(folder, tmp_path / "log", *LATENT) as server:
        assert in_turn(server.ready()) == want
        assert at_once(server) == want


def rest(stream):
    try:
        return stream.read()
    except (OSError, IncompleteRead) as error:
        return getattr(error, "partial", b"")


def test_a_file_that_is_not_the_model_s_ends_the_server_before_it_reads_weights(model, tmp_path):
    random_factors(tiny.model("mqa")).save(tmp_path / "other")
    expected = {
        "other": r"/other: expected \(Hkv, D\) = \(4, 32\), as the model has, got \(1, 32\)",
        "missing": r"additional_config\['lrattn'\]: expected a file of factors, got none at .*/missing",
    }
    with ExitStack() as running:
        servers = {
            name: running.enter_context(Server(model[0], tmp_path / f"{name}.log", *by(tmp_path / name)))
            for name in expected
        }
        for name, server in servers.items():
            assert server.ended() > 0
            log = server.log.read_text()
            (said,) = set(re.findall(r"Error: (lrattn: .*)", log))  # vLLM may print it twice
            assert re.search(expected[name], said) and "Loading weights" not in log
