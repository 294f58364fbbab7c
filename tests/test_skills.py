"""Skills: found with the unscaled model, and lost only where a drop is more than chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrator.evaluation.recall import Cell
from calibrator.facts import FactSource
from calibrator.scaling import Scaling
from calibrator.skills import LEAST_DROP, Drop, Skills
from tests.measured_models import demo_folder, load, random_tokens
from tests.stock_models import RememberingReporter, stock_model
from tests.tiny_folders import NOVEL

TRAIN_LEN = 512
NEAR, FAR = 64, 448


def shares(*values: float) -> Tensor:
    """What was found of the answers to as many prompts."""
    return torch.tensor(values, dtype=torch.float64)


def skills_of(answers: list[dict[tuple[str, int], Tensor]], monkeypatch: pytest.MonkeyPatch) -> Skills:
    """Skills of a model whose answers are given, measurement after measurement."""
    measured = iter(answers)

    def measure(_stock: Any, _source: Any, kinds: Any, cells: Any, *_: Any) -> list[Cell]:
        found = next(measured)
        assert cells == {TRAIN_LEN: (NEAR, FAR)}
        return [
            Cell(kind, TRAIN_LEN, distance, right, right)
            for (kind, distance), right in found.items()
            if kind in kinds
        ]

    monkeypatch.setattr("calibrator.skills.measure_recall", measure)
    source = FactSource([random_tokens(1, 2000)[0]], tokenizer=lambda text, **_: None)
    return Skills(stock_model("mamba2"), source, TRAIN_LEN, 4 * TRAIN_LEN, RememberingReporter())


def test_kind_is_a_skill_where_half_of_the_answers_are_found_near_by(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {
        ("random span", NEAR): shares(0.6, 0.4),
        ("random span", FAR): shares(0.0, 0.0),
        ("pass key", NEAR): shares(0.6, 0.3),
        ("pass key", FAR): shares(1.0, 1.0),
        ("1 pair", NEAR): shares(1.0, 1.0),
        ("1 pair", FAR): shares(1.0, 1.0),
    }
    skills = skills_of([before], monkeypatch)
    skills.begin()
    assert skills.kinds == ("random span", "1 pair")
    # Slices of the text are learnt with random spans.
    assert skills.planted == ("random span", "1 pair", "slice")
    assert "random span 50% at 64; random span 0% at 448; 1 pair 100% at 64" in skills.sentence()


def test_model_without_skills_has_nothing_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {(kind, place): shares(0, 0) for kind in ("random span", "pass key") for place in (NEAR, FAR)}
    skills = skills_of([nothing], monkeypatch)
    skills.begin()
    # A second measurement has no answers here.
    skills.begin()
    assert skills.kinds == skills.planted == () and skills.compare() == []
    assert "recalls nothing" in skills.sentence()


def test_drop_is_compared_with_what_chance_allows_among_all_skills(monkeypatch: pytest.MonkeyPatch) -> None:
    """One-sided, 5 % shared among four comparisons: the normal quantile of 1 - 0.05/4 is 2.2414."""
    generator = np.random.default_rng(0)
    noise = torch.from_numpy(generator.normal(0, 0.1, 24))
    noise -= noise.mean()
    error = float(noise.std()) / math.sqrt(24)
    places = [(kind, place) for kind in ("random span", "pass key") for place in (NEAR, FAR)]
    falls = dict(zip(places, (2.2 * error, 2.3 * error, -2.3 * error, 0.0), strict=True))
    before = {place: torch.full((24,), 0.8, dtype=torch.float64) for place in places}
    after = {place: before[place] - falls[place] + noise for place in places}
    skills = skills_of([before, after], monkeypatch)
    skills.begin()
    drops = skills.compare()
    assert [(drop.kind, drop.distance) for drop in drops] == places
    assert [drop.is_lost for drop in drops] == [False, True, False, False]
    assert [drop.bound for drop in drops] == pytest.approx([2.2414 * error] * 4, rel=1e-4)
    assert drops[1].after == pytest.approx(0.8 - 2.3 * error)


@pytest.mark.parametrize(("bound", "drop", "is_lost"), [(0.0, 1.1, True), (0.0, 0.9, False), (1.5, 1.1, False)])
def test_small_drop_is_no_loss_however_sure(bound: float, drop: float, is_lost: bool) -> None:
    found = Drop("pass key", 64, 0.9, 0.9 - drop * LEAST_DROP, bound * LEAST_DROP)
    assert found.is_lost == is_lost


def test_drop_in_words() -> None:
    assert Drop("pass key", 4096, 0.9, 0.25, 0.1).sentence() == "pass key at 4k tokens falls from 90% to 25%"


def test_recalling_model_loses_its_skill_under_wrong_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibrator.skills.PROMPTS_ON_CPU", 4)
    stock = load(demo_folder("demo:recall", tmp_path / "model"))
    source = FactSource([torch.tensor(stock.tokenizer(NOVEL.read_text()[:20_000]).input_ids)])
    with Scaling(stock.mixers, stock.A_log, "layer", "linear") as scaling, stock.recurrence:
        skills = Skills(stock, source, TRAIN_LEN, 4 * TRAIN_LEN, RememberingReporter())
        skills.begin()
        assert skills.kinds == ("random span",)
        same = skills.compare()
        assert len(same) == 2 and not any(drop.is_lost or drop.before != drop.after for drop in same)
        with torch.no_grad():
            for log_s in scaling.parameters():
                log_s.fill_(math.log(5))
        [far, near] = skills.compare()
    assert (far.distance, near.distance) == (FAR, NEAR)
    assert near.is_lost and near.before > 0.8 and near.after == 0 and not far.is_lost
