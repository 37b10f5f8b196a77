"""Tasks on compressed caches: what is asked, what is written, what counts as right; and the committed cells."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import DynamicCache

import lrattn
from bench.evaluation.quantisers import QUANTISERS
from bench.quality import PAGE, held_in
from bench.support import report
from bench.tasks import __main__ as main
from bench.tasks import continuation, humaneval, retrieval, tables, turns
from bench.tasks.held import held_cache
from bench.tasks.humaneval import body_of, written
from bench.tasks.rows import ROWS
from lrattn.integrations.transformers import LatentCache
from lrattn.models.interface import attention_set, cache_argument

LETTERS = "".join(chr(33 + i) for i in range(160))


class Characters:
    """A tokenizer of single characters: what the benchmarks ask of one."""

    eos_token_id, all_special_ids = 1, [1]

    def encode(self, text, add_special_tokens=False):
        return [2 + ord(c) % 158 for c in text]

    def decode(self, tokens):
        return "".join(LETTERS[t] for t in tokens)


@pytest.mark.parametrize(
    "text, body, ended",
    [
        ("    return 1\n", "    return 1\n", False),
        ("    return 1\n\n    # more\n", "    return 1\n\n    # more\n", False),
        ("    return 1\n\nprint(2)", "    return 1\n", True),
        ("    return 1\n```", "    return 1", True),
        ("x = 1\n", "", True),
        ("\n    return 1\n\n\ndef other():", "\n    return 1\n\n", True),
        ("", "", False),
    ],
)
def test_a_body_ends_where_a_line_begins_at_the_margin(text, body, ended):
    assert body_of(text) == (body, ended)


def test_a_program_is_the_beginning_its_body_and_its_tests():
    problem = humaneval.Problem("HumanEval/0", "def f(x):\n", "f", "def check(g):\n    assert g(1) == 2")
    for body, right in (("    return x + 1", True), ("    return x", False), ("", False)):
        found = humaneval.passes(problem.program(body))
        assert found[0] is right


def alone(model, prompt, cache, most):
    """Greedy, one prompt, token by token."""
    ids, found = torch.tensor([prompt]), []
    for _ in range(most):
        token = int(model(input_ids=ids, **cache_argument(cache)).logits[0, -1].argmax())
        found.append(token)
        ids = torch.tensor([[token]])
    return found


@pytest.mark.parametrize("kind", ["dense", "latents", "quantised"])
def test_a_batch_writes_what_each_prompt_writes_alone(kind, monkeypatch):
    """Whatever the lengths of the prompts, and when some rows have ended and left the batch."""
    model, prompts = tiny.model("llama"), [tiny.tokens(1, n, n)[0].tolist() for n in (5, 40, 23, 31)]
    factors = lrattn.compress(model, [tiny.tokens(2, 64)], keep=0.3, far=(8, 2), progress=False)
    new = {
        "dense": lambda starts: DynamicCache(),
        "latents": lambda starts: LatentCache(factors),
        "quantised": lambda starts: held_cache(3, "kivi-32", 2, 8, 2, starts),
    }[kind]
    most, inside = 60, attention_set(model, "lrattn" if kind == "latents" else model.config._attn_implementation)
    monkeypatch.setattr(humaneval, "body_of", lambda text: (text, False))
    monkeypatch.setattr(humaneval, "_ends", lambda tokenizer: {-1})
    with inside, torch.no_grad():
        expected = [alone(model, p, new(torch.zeros(1, dtype=torch.long)), most) for p in prompts]
        texts = [Characters().decode(x) for x in expected]
        assert written(model, Characters(), prompts, new, most) == texts
        stops = {texts[0][:7]: 7, texts[2][:20]: 20}  # these two end early, at different steps

        def ended(text):
            end = next((n for begin, n in stops.items() if text.startswith(begin)), None)
            return (text, False) if end is None else (text[:end], True)

        monkeypatch.setattr(humaneval, "body_of", ended)
        assert written(model, Characters(), prompts, new, most) == [texts[0][:7], texts[1], texts[2][:20], texts[3]]


@pytest.mark.parametrize("name, bits", [("kivi-32", 2), ("kivi-32", 4), ("rotated", 3)])
def test_what_leaves_the_window_is_quantised_once_in_whole_groups(name, bits):
    """From behind the first tokens of a row, padding aside; the window and what is no whole group stay."""
    recent, sinks, starts, tokens = 16, 3, torch.tensor([0, 11]), 100
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 4, tokens + 1, 32, generator=g)
    cache = held_cache(1, name, bits, recent, sinks, starts)
    for begin, end in ((0, 60), *((i, i + 1) for i in range(60, tokens + 1))):
        given = k[:, :, begin:end], v[:, :, begin:end]
        keys, values = cache.update(*given, 0)
        assert torch.equal(keys[:, :, begin:], given[0])  # a pass sees its own as they are
        if begin == 0:
            assert torch.equal(keys, k[:, :, :60])
    quantiser = QUANTISERS[name]
    for row, start in enumerate(starts.tolist()):
        first = start + sinks
        groups = (tokens + 1 - recent - first) // 32
        assert groups == 2
        end = first + 32 * groups
        for got, x, side in ((keys, k, quantiser.keys), (values, v, quantiser.values)):
            own = got[row].transpose(0, 1), x[row].transpose(0, 1)
            torch.testing.assert_close(own[0][first:end], side(own[1][first:end], bits), rtol=0, atol=1e-5)
            assert not torch.allclose(own[0][first:end], own[1][first:end], atol=1e-2)
            assert torch.equal(own[0][:first], own[1][:first]) and torch.equal(own[0][end:], own[1][end:])
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-60)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].done.tolist() == [11 + sinks + 64]


@pytest.fixture(scope="module")
def asked():
    return retrieval.written(Characters(), 30000)


def test_every_question_has_its_answer_in_the_text_where_it_says(asked):
    text, questions = asked
    assert 29000 < len(text) <= 30000
    kinds = [q.kind for q in questions]
    assert kinds.count("keys") == kinds.count("pairs") == retrieval.EACH and kinds.count("functions") > 3
    for q in questions:
        before = text[: q.place]
        if q.kind == "functions":
            name = q.asks.split("def ")[1]
            assert before.endswith(f"def {name}{q.answer}):") and text.count(f"def {name}(") == 1
        else:
            thing = q.asks.split('["')[1].split('"')[0] if q.kind == "pairs" else q.asks.split()[-2]
            line = before.rstrip(",.\n").splitlines()[-1]
            assert line.endswith(q.answer) and thing in line and text.count(line) == 1
    assert len({q.asks for q in questions}) == len(questions)
    places = sorted(q.place / len(text) for q in questions)
    assert places[0] < 0.1 and places[-1] > 0.9 and max(b - a for a, b in pairwise(places)) < 0.15


def test_the_text_but_for_what_is_planted_is_code_in_order(asked):
    text, _ = asked
    for line in ("# The pass key of", "TABLE_"):
        assert text.count(line) >= retrieval.EACH // retrieval.TABLE
    plain, _ = retrieval.written(Characters(), 20000)
    code = [x for x in plain.splitlines() if x.strip() and not x.startswith(("# The pass", "TABLE_", '    "', "}"))]
    longer = iter(text.splitlines())
    assert sum(line in longer for line in code[:-1]) > 0.95 * len(code)


class Oracle:
    """A model that holds likeliest what it is told to."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def passed(self, cache, ids, kept=1):
        self.seen.append(ids)
        return torch.nn.functional.one_hot(torch.tensor(self.tokens), 160).float()


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_an_answer_is_right_if_all_of_its_tokens_are(wrong):
    subject = SimpleNamespace(tokenizer=Characters())
    tokens = Characters().encode(" 1234")
    said = [t + (i == wrong) for i, t in enumerate(tokens)]
    oracle = Oracle(said)
    subject.passed = oracle.passed
    assert retrieval.answered(subject, None, "what is", " 1234") is (wrong is None)
    assert oracle.seen[0].tolist() == Characters().encode("what is 123")  # the last is not shown


def test_turns_are_of_different_people_and_paragraphs():
    chats = turns.chats()
    assert len(chats) == turns.CHATS and all(len(chat) == turns.TURNS for chat in chats)
    for chat in chats:
        assert len({name for _, name, _ in chat}) == len({number for _, _, number in chat}) == turns.TURNS
    assert len({p for chat in chats for p, _, _ in chat}) == turns.CHATS * turns.TURNS


def test_divergence_is_that_of_distributions_and_the_first_place_where_words_differ():
    torch.manual_seed(0)
    ids = tiny.tokens(1, 40)[0]
    dense, other = (torch.randn(30, 160).mul(3).log_softmax(-1) for _ in "ab")
    other[:12] = dense[:12] - 0.0
    subject = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuation, "NEW", 30)
        patch.setattr(continuation, "BIN", 10)
        patch.setattr(continuation, "texts", lambda subject: [ids])
        patch.setattr(continuation, "expected", lambda *_: dense)
        patch.setattr(continuation, "inside", lambda *_: torch.no_grad())
        patch.setattr(continuation, "scores", lambda *_: other)
        found = continuation.measure(subject, SimpleNamespace(name="x", dense=False))
    kl = torch.nn.functional.kl_div(other, dense, reduction="none", log_target=True).sum(-1)
    assert found["divergence"][0] == pytest.approx([0, kl[10:20].mean().item(), kl[20:].mean().item()], rel=1e-3)
    assert found["agreement"][0][0] == 1
    assert found["first"] == [next(i for i in range(30) if dense[i].argmax() != other[i].argmax())]
    assert continuation.at_end(found) == found["divergence"][0][-1]


CELLS = held_in(main.PATH)


def test_the_page_shows_the_committed_cells():
    page = PAGE.read_text()
    assert tables.pasted(page, CELLS) == page and all(f"<!-- bench.tasks: {name} -->" in page for name in tables.TABLES)
    named = [(cell["task"], cell["row"]) for cell in CELLS]
    assert len(set(named)) == len(named)
    assert set(named) <= {(task, name) for task, (_, _, names) in main.TASKS.items() for name in names}
    assert {("humaneval", "dense"), ("retrieval", "dense")} <= set(named)


def test_cells_hold_the_bytes_of_their_rows_and_an_answer_to_every_question():
    rows = {row.name: row for row in ROWS}
    for cell in CELLS:
        row = rows[cell["row"]]
        if row.quantiser:
            assert cell["bytes"] == QUANTISERS[row.quantiser].bits_per_number(row.bits, 64) / 16
        else:
            assert 0.95 * (row.keep or 1.0) < cell["bytes"] <= (row.keep or 1.0)
        if cell["task"] == "humaneval":
            names = {f"HumanEval/{i}" for i in range(tables.PROBLEMS)}
            assert set(cell["solved"]) | set(cell["said"]) == set(cell["bodies"]) == names
            assert not set(cell["solved"]) & set(cell["said"])
        if cell["task"] == "retrieval":
            dense = next(c for c in CELLS if (c["task"], c["row"]) == ("retrieval", "dense"))
            for length in map(str, retrieval.LENGTHS):
                own, other = ([(q["kind"], q["distance"]) for q in c["answers"][length]] for c in (cell, dense))
                assert own == other and len(own) >= 100


def test_lost_and_won_are_beside_the_dense_cache_with_an_interval():
    dense, own = [True] * 60 + [False] * 40, [True] * 50 + [False] * 10 + [True] * 5 + [False] * 35
    assert tables.pairs(own, dense) == (10, 5)
    assert tables.net_error(10, 5, 100) == pytest.approx((15 - 25 / 100) ** 0.5)
    assert tables.net(own, dense) == ["10", "5", "+5 (-3 .. +13)"]
    assert tables.net(dense, dense) == ["0", "0", "+0 (+0 .. +0)"]


def test_every_table_and_panel_is_made_of_cells(tmp_path):
    """Of two rows of every task."""
    answers = [{"kind": kind, "distance": 10 * i, "right": i % 3 > 0} for i, kind in enumerate(tables.KINDS * 40)]
    cells = []
    for row, share in (("dense", 1.0), ("kivi 2 bits", 0.1875)):
        more = {
            "humaneval": {"solved": ["HumanEval/3"]},
            "retrieval": {"answers": dict.fromkeys(map(str, retrieval.LENGTHS), answers)},
            "turns": {"right": [[True, False] * 5] * 10},
            "continuation": {"divergence": [[0.1] * 10] * 4, "agreement": [[0.9] * 10] * 4, "first": [7, 9, 1, 2]},
        }
        cells += [{"task": task, "row": row, "bytes": share, **found} for task, found in more.items()]
    shown = {name: table(cells) for name, table in tables.TABLES.items()}
    assert "kivi 2 bits" in shown["humaneval"] and shown["retrieval"].count("kivi 2 bits") == 3
    assert "50%" in shown["turns"] and "0.1000" in shown["continuation"] and "90.0%" in shown["continuation"]
    assert shown["continuation"].splitlines()[-1].split()[-1] == "8"
    tables.plot(cells, tmp_path / "a.png")
    tables.plot(cells[:1], tmp_path / "b.png")  # nothing to set beside it
    assert (tmp_path / "a.png").stat().st_size > 10000 and not (tmp_path / "b.png").exists()
    assert tables.programs([]) == tables.retrieval([]) == report.NONE
