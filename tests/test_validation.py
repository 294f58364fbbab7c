"""Judging candidates: the objective, the guard with its interval, and what happens when there is little text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrator.evaluation.perplexity import LengthLosses, bootstrap_error, resample_means
from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.skills import Drop
from calibrator.validation import ANSWERS, WON, Candidate, Losses, Validation
from converter.errors import TextError
from tests.measured_models import demo_folder, load, random_tokens
from tests.stock_models import stock_model

TRAIN_LEN = 16
LOST, KEPT = Drop("pass key", 16, 1.0, 0.0, 0.1), Drop("pass key", 16, 1.0, 1.0, 0.1)


def validation_of(
    stock: StockModel,
    scaling: Scaling,
    max_short_loss: float = 0.005,
    held_out: list[Tensor] | None = None,
    attention_window: int = 64,
) -> Validation:
    return Validation(
        stock,
        scaling,
        held_out or [random_tokens(1, 400)[0], random_tokens(1, 100, seed=1)[0]],
        Settings("gradient", "layer", "linear", TRAIN_LEN, attention_window, max_short_loss=max_short_loss),
    )


def set_factor(scaling: Scaling, factor: float) -> None:
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.fill_(math.log(factor))


@pytest.mark.parametrize("model_type", ["mamba2", "bamba"])
def test_objective_is_the_mean_change_over_octaves(model_type: str) -> None:
    stock = stock_model(model_type)
    parts = [random_tokens(1, 400)[0], random_tokens(1, 100, seed=1)[0]]
    with Scaling(stock.mixers, stock.A_log, "layer", "linear") as scaling, stock.recurrence, torch.no_grad():
        validation = validation_of(stock, scaling, held_out=parts, attention_window=1000)
        validation.begin()
        losses = []
        for factor in (1.0, 4.0):
            set_factor(scaling, factor)
            short = [window_losses(stock, part[: len(part) // 16 * 16].view(-1, 16)) for part in parts]
            long = [window_losses(stock, part[None])[0] for part in parts]
            octaves, edge = [torch.cat(short).mean()], 16
            while edge < max(map(len, long)):
                octaves.append(torch.cat([row[edge : 2 * edge] for row in long]).mean())
                edge *= 2
            losses.append(torch.stack(octaves))
        candidate = validation.judge(1)
    assert len(losses[0]) == 6
    assert candidate.objective == pytest.approx(float((losses[1] - losses[0]).mean()), abs=2e-6)
    assert candidate.objective != 0


@pytest.mark.parametrize(
    ("rise", "spread", "allowed"),
    [(0.0, 0.0, True), (0.004, 0.0, True), (0.006, 0.0, False), (0.004, 0.02, False), (-0.01, 0.02, True)],
)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_guard_looks_at_every_prefix_and_leaves_a_margin(
    rise: float, spread: float, allowed: bool, prefix: int
) -> None:
    """A candidate that gains at length is kept out if a prefix of short windows may lose more than 0.5 %."""
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "layer", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling)
        validation.begin()
    short = validation.unscaled.losses.short.clone()
    noise = torch.randn(len(short), generator=torch.Generator().manual_seed(0)).double()
    short[:, prefix] += rise + spread * (noise - noise.mean())
    octaves = {edge: loss - 1 for edge, loss in validation.unscaled.losses.octaves.items()}
    log_s = {key: torch.ones(1) for key in stock.A_log}
    validation.restore([{"step": 7, "log_s": log_s, "short": short, "octaves": octaves, "answers": None}])
    candidate = validation.candidates[1]
    assert candidate.allowed == allowed and candidate.objective < -0.5
    assert validation.best.step == (7 if allowed else 0)
    assert ("step 7 was better" in validation.guard_sentence()) != allowed
    if rise > 0:
        assert candidate.short_change == pytest.approx(rise, abs=1e-6)
        assert f"changes by {math.expm1(rise):+.2%} (90 % interval" in validation.short_sentence(candidate)


def test_nothing_worse_than_the_unscaled_model_is_ever_the_best(tmp_path: Path) -> None:
    stock = load(demo_folder("demo", tmp_path / "model"))
    text = [random_tokens(1, 200, vocabulary=4000)[0]]
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling, max_short_loss=10.0, held_out=text)
        validation.begin()
        for step, factor in enumerate((0.05, 20.0, 1.0), 1):
            set_factor(scaling, factor)
            validation.judge(step)
        worst = max(validation.candidates, key=lambda candidate: candidate.objective)
        assert worst.objective > 0 and validation.best.objective <= 0
        records = [candidate.record() for candidate in validation.candidates]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert set(records[0]["loss"]) == {"training length", "up to 32", "up to 64", "up to 128", "up to 200"}


def test_an_interrupted_run_takes_its_candidates_up_again() -> None:
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "power") as scaling, stock.recurrence:
        first, second = validation_of(stock, scaling), validation_of(stock, scaling)
        first.begin()
        second.begin()
        for step, factor in enumerate((0.9, 1.2), 1):
            set_factor(scaling, factor)
            first.judge(step)
        second.restore(first.state())
    assert [c.record() for c in second.candidates] == [c.record() for c in first.candidates]
    assert second.best.step == first.best.step
    for candidate, other in zip(first.candidates, second.candidates, strict=True):
        for key, values in candidate.scales.log_s.items():
            assert (values == other.scales.log_s[key]).all()


def test_candidates_are_judged_in_the_dtype_that_users_load() -> None:
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "layer", "linear") as scaling, stock.recurrence:
        results = {}
        for dtype in ("float32", "bfloat16"):
            set_factor(scaling, 1.0)
            settings = Settings("gradient", "layer", "linear", TRAIN_LEN, 64, max_short_loss=1.0, load_dtype=dtype)
            validation = Validation(stock, scaling, [random_tokens(1, 400)[0]], settings)
            validation.begin()
            # Too small a change for bfloat16 to show.
            set_factor(scaling, 1.0003)
            results[dtype] = validation.judge(1).objective
    assert results["float32"] != 0.0 == results["bfloat16"]


def test_too_little_text_to_validate_on_is_an_error() -> None:
    stock = stock_model("mamba2")
    scaling = Scaling(stock.mixers, stock.A_log, "layer", "linear")
    with pytest.raises(TextError, match=r"The 40 tokens .* make 2 windows of the training length 16"):
        validation_of(stock, scaling, held_out=[random_tokens(1, 40)[0]])


# The interval


def test_standard_error_of_independent_windows_is_the_textbook_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    error = float(resample_means(values).std())
    assert error == pytest.approx(float(values.std()) / 20, rel=0.15)


def test_neighbours_that_are_alike_widen_the_interval() -> None:
    """Of an AR(1) series with correlation 0.8, the mean's standard error is three times that of white noise."""
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
    values = torch.empty_like(noise)
    values[0] = noise[0]
    for i in range(1, len(noise)):
        values[i] = 0.8 * values[i - 1] + noise[i]
    naive = float(values.std()) / math.sqrt(len(values))
    assert 1.8 * naive < float(resample_means(values).std()) < 3.2 * naive
    before, after = LengthLosses(64, 5 + noise), LengthLosses(64, 5 + noise + values)
    in_table = bootstrap_error(before, after)
    assert in_table is not None and 1.8 * naive < in_table < 3.2 * naive
    assert bootstrap_error(LengthLosses(64, noise[:1]), LengthLosses(64, values[:1])) is None


def test_measures_are_drawn_alike_and_a_seed_repeats_the_draw() -> None:
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(2)).double()
    values[:, 1] = values[:, 0] + 1
    means = resample_means(values)
    torch.testing.assert_close(means[:, 1], means[:, 0] + 1)
    assert torch.equal(means, resample_means(values))
    assert not torch.equal(means, resample_means(values, seed=1))


def test_factors_that_the_guard_refuses_are_drawn_back_as_far_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step x along log s gains x nats at length and costs x² / 100 short: the limit of 0.5 % is at 0.706."""
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling)

        def measured() -> Losses:
            x = float(scaling.parameters()[0].detach().mean())
            return Losses(torch.full((8, 3), 4 + x * x / 100, dtype=torch.float64), {32: 4 - x, 64: 4 - x})

        monkeypatch.setattr(validation, "_measure", measured)
        validation.begin()
        set_factor(scaling, math.e)
        validation.judge(5)
        assert validation.best.step == 0
        best = validation.settle(lambda candidate: [])
    assert (best.step, best.share, best.record()["share"]) == (5, 0.6875, 0.6875)
    assert all(np.allclose(log_s, 0.6875) for log_s in best.scales.log_s.values())
    assert "Of log s of step 5, 69% is kept" in validation.guard_sentence()


@pytest.mark.parametrize("limit", [0.4, 0.0])
def test_factors_that_lose_a_skill_are_refused_and_drawn_back(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The perplexity allows every step; the skill bears log-factors up to ``limit``, tried to a sixteenth."""
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling)

        def reached() -> float:
            return float(scaling.parameters()[0].detach().mean())

        def measured() -> Losses:
            return Losses(torch.full((8, 3), 4, dtype=torch.float64), {32: 4 - reached(), 64: 4 - reached()})

        def compare(candidate: Candidate) -> list[Drop]:
            on_model = scaling.scale_set().log_s
            assert all((on_model[key] == values).all() for key, values in candidate.scales.log_s.items())
            return [LOST] if reached() > limit else [KEPT]

        monkeypatch.setattr(validation, "_measure", measured)
        validation.begin()
        for step, factor in ((5, math.e), (9, math.exp(0.9))):
            set_factor(scaling, factor)
            validation.judge(step)
        assert validation.best.step == 5
        best = validation.settle(compare)
        assert best is validation.best
    assert (best.step, best.share) == ((5, 0.375) if limit else (0, 1.0))
    refused = [candidate.record() for candidate in validation.candidates if candidate.risk]
    assert refused and all(not record["allowed"] and "pass key" in record["risk"] for record in refused)
    sentence = validation.guard_sentence()
    assert "step 5 was better over all lengths but loses a skill: pass key" in sentence
    assert ("Of log s of step 5, 38% is kept" in sentence) == bool(limit)


def test_another_step_that_keeps_every_skill_beats_one_drawn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling)

        def measured() -> Losses:
            x = float(scaling.parameters()[0].detach().mean())
            return Losses(torch.full((8, 3), 4, dtype=torch.float64), {32: 4 - x, 64: 4 - x})

        monkeypatch.setattr(validation, "_measure", measured)
        validation.begin()
        for step, factor in ((5, math.e), (9, math.exp(0.9))):
            set_factor(scaling, factor)
            validation.judge(step)
        best = validation.settle(lambda candidate: [LOST if candidate.step == 5 else KEPT])
    assert (best.step, best.share) == (9, 1.0)


@pytest.mark.parametrize("unreadable", [math.nan, math.inf])
def test_a_length_that_only_the_candidate_can_read_is_won(
    unreadable: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling)
        far = iter([unreadable, 9.0, unreadable])

        def measured() -> Losses:
            return Losses(torch.full((8, 3), 4, dtype=torch.float64), {32: 4.0, 64: next(far)})

        monkeypatch.setattr(validation, "_measure", measured)
        validation.begin()
        won, level = validation.judge(1), validation.judge(2)
    assert won.objective == pytest.approx(-WON / 3) and level.objective == 0
    assert validation.best is won


def test_planted_answers_weigh_beside_the_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        validation = validation_of(stock, scaling)
        answers = iter([5.0, 3.0])

        def measured() -> Losses:
            return Losses(torch.full((8, 3), 4, dtype=torch.float64), {32: 4.0}, next(answers))

        monkeypatch.setattr(validation, "_measure", measured)
        validation.begin()
        assert validation.judge(1).objective == pytest.approx(-2 * ANSWERS)
    assert validation.best.record()["answers"] == 3.0


def test_answers_about_far_facts_count_beside_the_prose() -> None:
    stock = stock_model("mamba2")
    answers = iter([4.0, 3.0, 5.5])
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence, torch.no_grad():
        validation = validation_of(stock, scaling)
        validation.begin(lambda: next(answers))
        better, worse = validation.judge(1), validation.judge(2)
    # The factors are all ones, so that the prose does not change.
    assert (better.objective, worse.objective) == pytest.approx((-ANSWERS, 1.5 * ANSWERS), abs=1e-6)
