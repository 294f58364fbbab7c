"""Facts in texts: planted where they are said to be, read as greedy decoding would, hidden by a window."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from calibrator.evaluation.baselines import at_end, in_chunks, sliding_losses
from calibrator.evaluation.recall import continue_greedily, measure_recall, seeded
from calibrator.facts import Fact, FactSource, plant
from calibrator.line_ends import is_hard_wrapped, unwrap
from calibrator.loss import window_losses
from converter.commands.cli import app
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import UsageError
from converter.reporting import Reporter
from tests.measured_models import demo_folder, load, random_tokens
from tests.stock_models import stock_model


def source() -> FactSource:
    return FactSource([random_tokens(1, 4000)[0]])


class OneFiller(FactSource):
    """The same filler for every prompt."""

    def filler(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.documents[0][:count]


def test_planted_answers_repeat_what_stands_before() -> None:
    text = random_tokens(1, 4000, seed=1)[0]
    planted, answers = plant(
        text, source(), ["random span"], torch.Generator().manual_seed(0), every=250, nearest=32, farthest=512
    )
    again, _ = plant(
        text, source(), ["random span"], torch.Generator().manual_seed(0), every=250, nearest=32, farthest=512
    )
    assert torch.equal(planted, again) and 0 < int(answers.sum()) < 400
    for place in answers.nonzero().flatten().tolist():
        token, before = planted[place], planted[max(0, place - 700) : place - 32]
        assert bool((before == token).any())
    untouched = planted == text
    assert int((~untouched).sum()) > int(answers.sum())


@pytest.mark.parametrize("model_type", ["mamba2", "zamba", "bamba"])
def test_answers_from_a_shared_state_are_those_of_whole_prompts(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, source = stock_model(model_type), OneFiller([random_tokens(1, 4000)[0]])
    with stock.recurrence:
        shared = measure_recall(stock, source, ["random span"], {1600: [64]}, 4, 0, Reporter(), "")
        monkeypatch.setattr("calibrator.evaluation.recall.SHORTEST_SHARED", 10_000)
        whole = measure_recall(stock, source, ["random span"], {1600: [64]}, 4, 0, Reporter(), "")
    torch.testing.assert_close(shared[0].nats, whole[0].nats, rtol=1e-4, atol=1e-4)


def test_a_recurrence_opened_twice_stays_open_until_it_is_closed_twice() -> None:
    stock = stock_model("mamba2")
    text = random_tokens(1, 300)
    with stock.recurrence:
        with stock.recurrence:
            pass
        with stock.recurrence.carried(None) as state:
            stock.hidden_states(text[:, :200])
        with stock.recurrence.carried(state):
            carried = stock.hidden_states(text[:, 200:])
        whole = stock.hidden_states(text)[:, 200:]
    torch.testing.assert_close(carried, whole, rtol=1e-4, atol=1e-4)


def test_far_facts_are_planted_though_near_ones_share_their_question() -> None:
    text = random_tokens(1, 40_000, seed=1)[0]
    question, length = torch.tensor([7, 8, 9]), 4

    class OneQuestion(FactSource):
        def draw(self, kind: str, generator: torch.Generator, *, varied: bool = False) -> Fact:
            answer = self.random_tokens(length, generator)
            return Fact(answer, question, answer)

    planted, answers = plant(
        text,
        OneQuestion([text]),
        ["pass key"],
        torch.Generator().manual_seed(0),
        every=250,
        nearest=64,
        farthest=4096,
    )
    rows = planted.unfold(0, length, 1)
    starts = [p for p in answers.nonzero().flatten().tolist() if not answers[p - 1]]
    distances = []
    for start in starts:
        same = (rows == planted[start : start + length]).all(1).nonzero().flatten()
        distances.append(start - int(same[same < start].max()))
    assert sum(distance > 1024 for distance in distances) >= len(distances) / 5


def test_answers_have_the_tokens_that_they_have_behind_their_question() -> None:
    letters = ["<unk>", "\u2581", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
    # As SentencePiece does, it writes a space before every text.
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always")
    facts = FactSource([torch.arange(10)], PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert [letters[i] for i in facts.encode("46", after="Answer: ").tolist()] == ["4", "6"]
    fact = facts.draw("pass key", torch.Generator().manual_seed(0))
    assert "".join(letters[i] for i in fact.question.tolist()) == "\u2581Answer:"
    assert letters[int(fact.answer[0])] == "\u2581" and len(fact.answer) == 6


@pytest.mark.parametrize("model_type", ["mamba2", "bamba", "kimi_linear"])
def test_greedy_tokens_are_those_of_generate(model_type: str) -> None:
    stock = stock_model(model_type)
    prompt = random_tokens(1, 50)[0]
    with stock.recurrence:
        said = continue_greedily(stock, prompt, 5)
    expected = stock.model.generate(prompt[None], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 50:]
    assert said.tolist()[: len(expected)] == expected.tolist()


@pytest.mark.parametrize("model_type", ["mamba2", "bamba"])
def test_the_chunk_with_the_surest_prediction_answers(model_type: str) -> None:
    """Two prompts of 3 tokens of announcement and chunks of 17, 17 and 16, or 18, 18 and 15 tokens."""
    stock, opening, length = stock_model(model_type), 3, 57
    rows = random_tokens(2, length + 2)
    facts = [
        Fact(rows[0, 9:12], rows[0, length - 4 : length], rows[0, length:]),
        Fact(rows[1, 9:12], rows[1, length - 3 : length], rows[1, length : length + 1]),
    ]
    with stock.recurrence, torch.no_grad():
        found = in_chunks(24)(stock, rows, length, facts, opening)
        for place, (row, fact, room) in enumerate(zip(rows, facts, (17, 18), strict=True)):
            said = []
            for chunk in row[opening : length - len(fact.question)].split(room):
                text = torch.cat([row[:opening], chunk, fact.question, fact.answer])
                chances = stock.model(text[None]).logits[0, -len(fact.answer) - 1 : -1].float().softmax(-1)
                entropy = -sum(float(p) * math.log(float(p)) for p in chances[0])
                of_answer = [float(row[token]) for row, token in zip(chances, fact.answer, strict=True)]
                hits = (chances.argmax(-1) == fact.answer).double().mean()
                said.append((entropy, float(hits), -sum(map(math.log, of_answer)) / len(of_answer)))
            assert len(said) == 3
            values = (found.entropy[place], found.right[place], found.nats[place])
            assert [float(value) for value in values] == pytest.approx(min(said), rel=1e-3)


def test_chunks_find_a_fact_that_lies_before_a_sliding_window(tmp_path: Path) -> None:
    stock = load(demo_folder("demo:recall", tmp_path / "model"))
    text = stock.tokenizer(Path(HELD_OUT_NOVEL).read_text()[:20_000], return_tensors="pt").input_ids[0]
    facts = FactSource([text], stock.tokenizer)
    with stock.recurrence:
        chunks, end = (
            measure_recall(stock, facts, ["pass key"], {1500: [900]}, 4, 0, Reporter(), "", reader(400))
            for reader in (in_chunks, at_end)
        )
    assert chunks[0].rate >= 0.5 and end[0].rate == 0


def test_evaluate_reads_in_chunks() -> None:
    words = [
        "evaluate",
        "demo:recall",
        "--task",
        "recall",
        "--lengths",
        "1k",
        "--distances",
        "700",
        "--samples",
        "2",
    ]
    words += ["--kind", "pass key", "--json", "--chunks"]
    done = CliRunner().invoke(app, [*words, "400"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["settings"]["chunks"] == 400 and record["cells"][0]["found"] >= 1
    assert "read in chunks of 400," in done.stderr
    refused = CliRunner().invoke(app, [*words, "16"]).exception
    assert isinstance(refused, UsageError) and "no room" in refused.message


def test_sliding_window_predicts_every_token_once() -> None:
    stock = stock_model("mamba2")
    span = random_tokens(1, 128)
    with stock.recurrence, torch.no_grad():
        losses = sliding_losses(stock, span, 32)
        first, second = window_losses(stock, span[:, :32]), window_losses(stock, span[:, 16:48])
    assert losses.shape == (1, 127)
    torch.testing.assert_close(losses[0, :31], first[0].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[0, 31:47], second[0, 15:].double(), rtol=1e-5, atol=1e-5)


def test_hard_line_ends_are_told_from_code() -> None:
    wrapped = "\n\n".join(
        "\n".join(["a line of a book that was set in type a long time ago and so"] * 9) for _ in "ab" * 9
    )
    code = "\n".join(["def f(x):", "    return x + 1", ""] * 60)
    assert is_hard_wrapped(wrapped) and not is_hard_wrapped(code) and not is_hard_wrapped(unwrap(wrapped))
    assert "\n" not in unwrap(wrapped)


def test_seeds_are_words() -> None:
    draws = [torch.rand(3, generator=seeded(words)) for words in ("a 1", "a 1", "a 2")]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
