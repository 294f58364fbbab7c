"""Every method goes downhill: in a valley whose lowest point is known, and on the bundled tiny checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrator.calibration import Outcome, Problem, calibrate, prepare_calibration
from calibrator.methods import constant
from calibrator.methods.floor import TAUS, floor_scales, start_floor, text_steps
from calibrator.methods.winsorize import scales_without_data
from calibrator.model import StockModel
from calibrator.recurrence import Recurrence
from calibrator.settings import Settings
from calibrator.text import Text
from converter.errors import UsageError
from converter.scales import ScaleSet
from tests.measured_models import demo_folder, load
from tests.stock_models import RememberingReporter

TRAIN_LEN, TARGET_LEN, VOCABULARY = 32, 128, 8
# Log factors of the two layers.
LOWEST = (0.5, -0.4)
COUNTING = Text("counting", (torch.arange(6000) % VOCABULARY,))


class Mixer(nn.Module):
    """What a layer of the valley has beside its A_log: nothing."""

    def __init__(self, A_log: Tensor) -> None:
        super().__init__()
        self.A_log = nn.Parameter(A_log, requires_grad=False)

    def forward(self) -> Tensor:
        """A_log as it is scaled."""
        return self.A_log


class Valley(StockModel):
    """Predicts the next number of a count, with a loss that its A_log alone decide.

    A prediction within the training length costs 1 nat; one beyond it 1 + depth · mean (log s - LOWEST)².

    Args:
        rise: of the loss within the training length, times the mean log s.

    Attributes:
        visited: the log factors of every pass that differs from the one before, in order.
    """

    def __init__(self, depth: float = 1.0, rise: float = 0.0) -> None:
        self.depth = depth
        self.rise = rise
        self.visited: list[Tensor] = []
        mixers = {f"layers.{layer}.mixer.A_log": Mixer(torch.zeros(2)) for layer in range(2)}
        model: Any = nn.ModuleList(mixers.values())
        model.config = SimpleNamespace(model_type="valley")
        A_log = {key: torch.zeros(2) for key in mixers}
        super().__init__(model, None, mixers, A_log, torch.float32, Recurrence(model, mixers))

    device = torch.device("cpu")
    vocab_size = rows = VOCABULARY  # type: ignore[assignment]

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """(batch, length, 2): the loss of the next prediction, and the number before it."""
        log_s = torch.stack([mixer().flatten()[0] for mixer in self.mixers.values()])
        if not self.visited or not torch.equal(self.visited[-1], log_s.detach()):
            self.visited.append(log_s.detach().clone())
        beyond = torch.arange(tokens.shape[1]) >= TRAIN_LEN - 1
        far = self.depth * ((log_s - torch.tensor(LOWEST)) ** 2).mean()
        losses = 1 + torch.where(beyond, far, self.rise * log_s.mean())
        return torch.stack([losses.expand(tokens.shape), tokens.float()], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores under which the right number has the loss, and the others share the rest."""
        loss, number = hidden.unbind(-1)
        right = torch.nn.functional.one_hot((number.long() + 1) % VOCABULARY, VOCABULARY).bool()
        others = torch.log((1 - torch.exp(-loss)) / (VOCABULARY - 1))
        return torch.where(right, -loss[..., None], others[..., None])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings_of(method: str, **own: Any) -> Settings:
    return Settings(method, "layer", "linear", TRAIN_LEN, TARGET_LEN, **{"short_windows": 2, **own})


def descend(valley: Valley, settings: Settings, reporter: RememberingReporter | None = None) -> Outcome:
    problem = prepare_calibration(valley, [COUNTING], settings, reporter or RememberingReporter(), "commit")
    outcome = calibrate(problem)
    problem.journal.remove()
    return outcome


def found(outcome: Outcome) -> list[float]:
    return [float(values.mean()) for values in outcome.scales.log_s.values()]


@pytest.mark.parametrize(
    ("settings", "closeness"),
    [
        (settings_of("gradient"), 0.05),
        (settings_of("gradient", lr=0.05, steps=60), 0.02),
        (settings_of("spsa", steps=120), 0.1),
        (settings_of("spsa", probes=1, steps=120), 0.15),
    ],
    ids=["gradient", "gradient, other rate", "spsa", "spsa, one probe"],
)
def test_lowest_point_of_a_valley_is_found(settings: Settings, closeness: float) -> None:
    assert found(descend(Valley(), settings)) == pytest.approx(LOWEST, abs=closeness)


@pytest.mark.parametrize("lowest", [(1.3, 1.3), (-0.9, -0.7), (0.0, 0.0)])
def test_constant_finds_the_one_factor(lowest: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_descent.LOWEST", lowest)
    outcome = descend(Valley(), settings_of("constant"))
    # The stride is an eighth of an octave at last.
    assert found(outcome) == pytest.approx([sum(lowest) / 2] * 2, abs=math.log(2) / 16 + 1e-6)


@pytest.mark.parametrize(("lowest", "rise", "due"), [((9.0, 9.0), 0.0, 4.0), ((1.0, 1.0), 0.1, 0.5)])
def test_constant_stays_in_range_and_within_the_guard(
    lowest: tuple[float, float], rise: float, due: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four octaves either way; and a rise of 0.1 nats an e-fold is allowed for half of an octave, 3.5 %."""
    monkeypatch.setattr("tests.test_descent.LOWEST", lowest)
    outcome = descend(Valley(rise=rise), settings_of("constant", max_short_loss=0.036))
    assert found(outcome) == pytest.approx([due * math.log(2)] * 2)


# SPSA as the paper ran it


def perplexity(valley: Valley, s: Tensor) -> float:
    """Of a whole window of the target length, by the valley's formula."""
    share = (TARGET_LEN - TRAIN_LEN) / (TARGET_LEN - 1)
    return math.exp(1 + share * valley.depth * float(((s.log() - torch.tensor(LOWEST)) ** 2).mean()))


def walk(depth: float = 3.0, **own: Any) -> tuple[Valley, list[Tensor], Outcome]:
    """The preset's walk through a valley, and the factors that it tried after the unscaled model."""
    valley = Valley(depth)
    outcome = descend(valley, settings_of("spsa", preset="paper", **own))
    first = next(place for place, log_s in enumerate(valley.visited) if log_s.any())
    return valley, [log_s.double().exp() for log_s in valley.visited[first:]], outcome


@pytest.mark.parametrize("steps", [None, 99, 250])
def test_paper_walk_follows_its_schedules_downhill(steps: int | None) -> None:
    """Its thirty steps, each 0.001 cos(kπ/198) along the slope between two points 0.1/(1+k)^0.1 away."""
    valley, tried, outcome = walk(steps=steps)
    count = steps or 30
    assert len(tried) == 2 * count + 1 and (outcome.record.steps, outcome.record.kept_step) == (count, count)
    assert found(outcome) == pytest.approx(tried[-1].log().tolist(), abs=1e-6)
    centres = [(tried[2 * k] + tried[2 * k + 1]) / 2 for k in range(count)] + [tried[-1]]
    for k, (here, there) in enumerate(itertools.pairwise(centres)):
        up, down = tried[2 * k], tried[2 * k + 1]
        spread = 0.1 / (1 + k) ** 0.1
        torch.testing.assert_close((up - down).abs() / 2, torch.full_like(up, spread), atol=1e-6, rtol=0)
        slope = (perplexity(valley, up) - perplexity(valley, down)) / (2 * spread) * (up - down).sign()
        rate = 0.001 * math.cos(k * math.pi / max(198, 2 * count))
        assert rate >= 0
        torch.testing.assert_close(there - here, -rate * slope, atol=2e-5, rtol=0)
    assert perplexity(valley, centres[-1]) < perplexity(valley, centres[0])


def test_preset_starts_at_random() -> None:
    low, high, starts = 0.75, 1.0, []
    for seed in range(30):
        _, tried, _ = walk(depth=0.01, steps=1, seed=seed)
        starts += [value for value in ((tried[0] + tried[1]) / 2).tolist() if value > 0.11]
    margin = (high - low) / 5
    assert low <= min(starts) < low + margin + 0.1 and high - margin < max(starts) <= high


def test_preset_keeps_factors_above_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = 0.01
    monkeypatch.setattr("tests.test_descent.LOWEST", (-9.0, -9.0))
    _, tried, outcome = walk(depth=0.05, steps=60, lr=0.05)
    assert min(float(s.min()) for s in tried) == pytest.approx(floor)
    assert min(found(outcome)) == pytest.approx(math.log(floor))


def test_preset_that_makes_it_worse_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for lowest, worse in (((0.0, 0.0), True), ((-0.2, -0.2), False)):
        monkeypatch.setattr("tests.test_descent.LOWEST", lowest)
        reporter = RememberingReporter()
        outcome = descend(Valley(), settings_of("spsa", preset="paper", steps=2), reporter)
        assert outcome.record.kept_step == 2
        assert any("keeps its last factors" in warning for warning in reporter.warnings) == worse


# Methods that compute their factors


@pytest.mark.parametrize(("shape", "granularity"), [((50,), "head"), ((6, 16), "element")])
def test_winsorizing_clips_to_the_quantiles_of_a_layer(shape: tuple[int, ...], granularity: Any) -> None:
    A_log = np.random.default_rng(0).uniform(-2, 3, shape)
    settings = Settings("winsorize", granularity, "linear", 0, 0, quantile=0.2)
    scales = scales_without_data([("layer", A_log)], settings)
    A = np.exp(A_log)
    clipped = A.clip(*np.quantile(A, [0.2, 0.8]))
    assert (clipped > A).any() and (clipped < A).any() and (clipped == A).any()
    np.testing.assert_allclose(A * np.exp(scales.log_s["layer"]), clipped, rtol=1e-6)


@pytest.mark.parametrize("quantile", [0.0, 0.5, -0.1, math.nan])
def test_quantile_that_clips_nothing_or_all_is_refused(quantile: float) -> None:
    with pytest.raises(UsageError, match="--quantile is"):
        scales_without_data([], Settings("winsorize", "head", "linear", 0, 0, quantile=quantile))


def test_constant_is_filled_in_as_given() -> None:
    layers = [("a", np.zeros(4)), ("b", np.zeros(4))]
    scales = constant.scales_without_data(layers, settings_of("constant", factor=1.5))
    assert scales is not None
    assert all(values == pytest.approx(math.log(1.5)) for values in scales.log_s.values())
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="--factor is"):
            constant.scales_without_data(layers, settings_of("constant", factor=factor))


# The bundled tiny checkpoint


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> StockModel:
    """The bundled model with six times its A, so that every method has something to gain."""
    return load(demo_folder("demo", tmp_path_factory.mktemp("steep") / "model", 6.0))


@pytest.fixture(scope="module")
def novel(steep: StockModel) -> Text:
    text = (Path(__file__).parent.parent / "converter/demo/texts/persuasion.txt").read_text()[:30_000]
    return Text("novel", (torch.tensor(steep.tokenizer(text).input_ids),))


def pose_on_steep(steep: StockModel, novel: Text, method: str, **own: Any) -> Problem:
    """A problem of windows of 64 tokens for training and 256 as the target."""
    usual = {"granularity": "layer", "form": "linear", "max_short_loss": 0.05, "short_windows": 2, "validations": 1}
    settings = Settings(method, train_len=64, target_len=256, **usual | own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibrator.calibration.VALIDATION_TRAIN_LENS", 16)
        return prepare_calibration(steep, [novel], settings, RememberingReporter(), "commit")


@pytest.mark.parametrize(
    ("method", "own", "gain"),
    [
        ("gradient", {"steps": 8, "lr": 0.3}, 0.1),
        ("spsa", {"steps": 5, "lr": 0.1}, 0.03),
        ("constant", {}, 0.5),
    ],
)
def test_methods_gain_on_the_tiny_checkpoint(
    method: str, own: Mapping[str, Any], gain: float, steep: StockModel, novel: Text
) -> None:
    problem = pose_on_steep(steep, novel, method, **own)
    outcome = calibrate(problem)
    [kept] = [c for c in problem.validation.candidates if c.scales is outcome.scales]
    assert kept.objective < -gain
    if method == "constant":
        assert found(outcome) == pytest.approx([-math.log(6)] * 6, abs=0.1)


def test_floor_brings_slow_eigenvalues_down_to_tau(steep: StockModel, novel: Text) -> None:
    """Time constants of 1 / (|A| s Δ) tokens: those above tau become tau, and no other moves."""
    problem = pose_on_steep(steep, novel, "floor", granularity="head")
    by_layer = pose_on_steep(steep, novel, "floor").scaling
    with problem.scaling, steep.recurrence, torch.no_grad():
        steps = text_steps(problem)
        floor = floor_scales(steep, problem.scaling, steps, tau=40)
        coarse = floor_scales(steep, by_layer, steps, tau=40)
    moved = 0
    for key, A_log in steep.A_log.items():
        slow = 1 / (A_log.double().exp() * steps[key])
        s = torch.from_numpy(floor.log_s[key]).double().exp()
        torch.testing.assert_close(slow / s, slow.clamp(max=40), rtol=1e-5, atol=0)
        moved += int((s > 1).sum())
        assert float(coarse.log_s[key][0]) == float(floor.log_s[key].max())
    assert 0 < moved < sum(len(A_log) for A_log in steep.A_log.values())


def test_floor_keeps_the_tau_that_validates_best(steep: StockModel, novel: Text) -> None:
    problem = pose_on_steep(steep, novel, "floor")
    outcome = calibrate(problem)
    tried = problem.validation.candidates[1:]
    assert [candidate.step for candidate in tried] == [1, 2, 3]
    best = min(tried, key=lambda candidate: candidate.objective)
    assert best.objective < 0 and outcome.scales is best.scales and outcome.record.kept_step != 1
    with problem.scaling, steep.recurrence, torch.no_grad():
        steps = text_steps(problem)
        for candidate, share in zip(tried, TAUS, strict=True):
            due = floor_scales(steep, problem.scaling, steps, share * 64)
            assert all((due.log_s[key] == values).all() for key, values in candidate.scales.log_s.items())
    given = pose_on_steep(steep, novel, "floor", tau=30.0, max_short_loss=10.0)
    outcome = calibrate(given)
    with given.scaling, steep.recurrence, torch.no_grad():
        due = floor_scales(steep, given.scaling, text_steps(given), 30)
    assert len(given.validation.candidates) == 2
    assert all((due.log_s[key] == values).all() for key, values in outcome.scales.log_s.items())


@pytest.mark.parametrize(("floor", "start"), [(0.4, 0.4), (-0.4, 0.0)])
def test_gradient_starts_from_a_floor_that_gains(
    floor: float, start: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest point is at 0.3: a step of no length stays at the better one of the floor and s = 1."""
    monkeypatch.setattr("tests.test_descent.LOWEST", (0.3, 0.3))

    def given(problem: Problem) -> ScaleSet:
        ones = problem.validation.unscaled.scales
        return replace(ones, log_s={key: values + np.float32(floor) for key, values in ones.log_s.items()})

    monkeypatch.setattr("calibrator.methods.gradient.start_floor", given)
    valley = Valley()
    descend(valley, settings_of("gradient", steps=1, lr=1e-9))
    assert valley.visited[1].tolist() == pytest.approx([floor] * 2)
    assert valley.visited[-1].tolist() == pytest.approx([start] * 2, abs=1e-4)


def test_floor_of_twice_the_training_length_is_where_gradients_start(steep: StockModel, novel: Text) -> None:
    problem = pose_on_steep(steep, novel, "gradient")
    with problem.scaling, steep.recurrence, torch.no_grad():
        due, found = floor_scales(steep, problem.scaling, text_steps(problem), 128), start_floor(problem)
    assert found is not None and any(values.any() for values in found.log_s.values())
    assert all((found.log_s[key] == values).all() for key, values in due.log_s.items())


def test_formulas_for_A_itself_have_one_form(steep: StockModel, novel: Text) -> None:
    with pytest.raises(UsageError, match="linear form"):
        calibrate(pose_on_steep(steep, novel, "floor", form="power"))
    with pytest.raises(UsageError, match="only one form"):
        scales_without_data([], Settings("winsorize", "head", "power", 0, 0))
