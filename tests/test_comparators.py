"""The mechanisms of the comparators: what each does to the steps, and that it does nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.comparators import (
    ConstantScaling,
    DeciMamba,
    LongMamba,
    MambaExtend,
    fit_longmamba,
    fit_mambaextend,
    make_decimamba,
)
from calibrator.cpu_scan import selective_scan
from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.text import Text
from converter.errors import UsageError
from tests.measured_models import QUIET, random_tokens, tiny_stock

WINDOWS = random_tokens(2, 60)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> StockModel:
    return tiny_stock("mamba", tmp_path_factory.mktemp("mamba"))


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> StockModel:
    return tiny_stock("mamba2", tmp_path_factory.mktemp("mamba2"))


def losses(stock: StockModel) -> torch.Tensor:
    with torch.no_grad():
        return window_losses(stock, WINDOWS)


def seen_steps(stock: StockModel, length: int) -> dict[str, torch.Tensor]:
    """Δ of every layer on one window, before any comparator."""
    seen = {}
    with (
        stock.recurrence,
        stock.recurrence.stepping(lambda key, delta: seen.setdefault(key, delta)),
        torch.no_grad(),
    ):
        stock.hidden_states(WINDOWS[:1, :length])
    return seen


def test_constant_scaling_is_what_the_scale_module_runs(mamba: StockModel) -> None:
    scaling = Scaling(mamba.mixers, mamba.A_log, "layer", "linear")
    with mamba.recurrence:
        with ConstantScaling("A", 1.7).applied(mamba, 60):
            found = losses(mamba)
        with scaling, torch.no_grad():
            for log_s in scaling.parameters():
                log_s.fill_(1.7).log_()
            expected = losses(mamba)
        assert (found - losses(mamba)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mambaextend_scales_each_layer_by_its_own_factor(mamba2: StockModel) -> None:
    steps = seen_steps(mamba2, 60)
    method = MambaExtend({key: 2.0 + place for place, key in enumerate(mamba2.mixers)})
    with mamba2.recurrence, method.applied(mamba2, 60):
        choose = mamba2.recurrence._steps
        assert choose is not None
        for place, (key, delta) in enumerate(steps.items()):
            assert torch.equal(choose(key, delta), delta * (2.0 + place))


def test_mambaextend_walks_downhill(mamba2: StockModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a valley whose lowest point is a factor of 0.5 in every layer."""

    def valley(stock: StockModel, _windows: torch.Tensor) -> torch.Tensor:
        assert stock.recurrence._steps is not None
        factors = torch.stack([stock.recurrence._steps(key, torch.ones(())) for key in stock.mixers])
        return 4 * ((factors - 0.5) ** 2).sum()

    monkeypatch.setattr("benchmarks.comparators.window_losses", valley)
    text = Text("random", tuple(random_tokens(1, 1300, seed=3)))
    with mamba2.recurrence:
        fitted = fit_mambaextend(mamba2, text, 60, QUIET)
    factors = list(fitted.factors.values())
    start = torch.empty(len(factors)).uniform_(0.75, 1.0, generator=torch.Generator().manual_seed(0))
    assert sum((s - 0.5) ** 2 for s in factors) < 0.9 * float(((start - 0.5) ** 2).sum())


def test_longmamba_skips_small_steps_of_global_channels_alone(mamba2: StockModel) -> None:
    key = next(iter(mamba2.mixers))
    steps = seen_steps(mamba2, 60)[key][0]
    thresholds = {name: torch.zeros(4) for name in mamba2.mixers}
    thresholds[key][1] = steps[:, 1].median()
    seen = {}
    method = LongMamba({60: thresholds}, 0.1)
    with mamba2.recurrence, torch.no_grad(), method.applied(mamba2, 60):
        choose = mamba2.recurrence._steps
        assert choose is not None
        seen[key] = choose(key, steps[None])[0]
    assert torch.equal(seen[key][:, [0, 2, 3]], steps[:, [0, 2, 3]])
    kept = steps[:, 1] >= thresholds[key][1]
    assert torch.equal(seen[key][:, 1], torch.where(kept, steps[:, 1], 0.0))
    assert 25 < int(kept.sum()) < 35


@pytest.mark.parametrize("which", ["mamba", "mamba2"])
def test_longmamba_aligns_the_steps_to_the_training_length(which: str, request: pytest.FixtureRequest) -> None:
    stock: StockModel = request.getfixturevalue(which)
    text = Text("random", tuple(random_tokens(1, 16 * 20 * 3, seed=3)))
    with stock.recurrence:
        fitted = fit_longmamba(stock, text, train_len=20, lengths=(20, 60), reporter=QUIET)
    assert all(not threshold.any() for threshold in fitted.thresholds[20].values())
    steps = seen_steps(stock, 60)
    for key, delta in steps.items():
        kept = delta[0] * (delta[0] >= fitted.thresholds[60][key])
        is_global = fitted.thresholds[60][key] > 0
        share = kept.sum(0) / delta[0].sum(0)
        assert torch.all(share[~is_global] == 1)
        if is_global.any():
            assert float(share[is_global].mean()) == pytest.approx(20 / 60, abs=0.12)


def test_longmamba_without_thresholds_changes_nothing(mamba2: StockModel) -> None:
    nothing = LongMamba({60: {key: torch.zeros(4) for key in mamba2.mixers}}, 0.1)
    with mamba2.recurrence:
        expected = losses(mamba2)
        with nothing.applied(mamba2, 60):
            torch.testing.assert_close(losses(mamba2), expected, rtol=1e-5, atol=1e-5)


def test_skipped_tokens_leave_the_state_as_it_was() -> None:
    """A scan of the kept tokens alone, against the whole one in which the others' Δ is 0."""
    generator = torch.Generator().manual_seed(0)
    u, delta = torch.randn(1, 3, 30, generator=generator), torch.rand(1, 3, 30, generator=generator)
    A = -torch.rand(3, 4, generator=generator)
    B, C = (torch.randn(1, 30, 4, generator=generator) for _ in range(2))
    h = torch.zeros(1, 3, 4)
    kept = torch.randperm(30, generator=generator)[:12].sort().values
    is_kept = torch.zeros(30).scatter(0, kept, 1.0)
    whole, state, _ = selective_scan(u, delta * is_kept, A, B, C, h)
    alone, state_alone, _ = selective_scan(u[..., kept], delta[..., kept], A, B[:, kept], C[:, kept], h)
    torch.testing.assert_close(whole[..., kept], alone)
    torch.testing.assert_close(state, state_alone)


def test_decimamba_passes_on_the_tokens_with_the_largest_mean_step(mamba: StockModel) -> None:
    first, second = mamba.mixers
    method = DeciMamba((first,), base=20, ratio=0.5, tail=6)
    expected = seen_steps(mamba, 60)[first].mean(2)[0]
    expected[-7:] = float("inf")
    passed_on: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    with torch.no_grad(), mamba.recurrence:
        blocks = mamba.model.backbone.layers
        # This hook is registered before the method's own, so it sees the layer's output before tokens are dropped.
        before = blocks[0].register_forward_hook(lambda _, __, hidden: whole.append(hidden))
        after = blocks[1].register_forward_pre_hook(lambda _, inputs: passed_on.append(inputs[0]))
        with method.applied(mamba, 60):
            hidden = mamba.hidden_states(WINDOWS[:1])
        before.remove()
        after.remove()
    kept = expected.topk(20).indices.sort().values
    assert kept[-7:].tolist() == list(range(53, 60)) and second not in method.layers
    assert torch.equal(passed_on[0], whole[0][:, kept])
    assert hidden.shape[1] == method.tokens_kept(first) == 20


def test_decimamba_schedule_by_layer(mamba: StockModel) -> None:
    method = DeciMamba(tuple(mamba.mixers), base=40, ratio=0.5, tail=6)
    assert [method.tokens_kept(key) for key in mamba.mixers] == [40, 20]
    with torch.no_grad(), mamba.recurrence, method.applied(mamba, 60):
        assert mamba.hidden_states(WINDOWS).shape[:2] == (2, 20)
    assert DeciMamba(tuple(mamba.mixers), base=10, ratio=0.1, tail=6).tokens_kept(list(mamba.mixers)[1]) == 7


def test_decimamba_keeps_short_windows_whole(mamba: StockModel) -> None:
    method = make_decimamba(mamba, train_len=15, tail=6)
    assert method.base == 60 and len(method.layers) == 1
    with torch.no_grad(), mamba.recurrence:
        expected = mamba.hidden_states(WINDOWS)
        with method.applied(mamba, 60):
            torch.testing.assert_close(mamba.hidden_states(WINDOWS), expected)
    after = seen_steps(mamba, 60)
    assert all(delta.shape[1] == 60 for delta in after.values())


def test_decimamba_is_for_mamba_1(mamba2: StockModel) -> None:
    with pytest.raises(UsageError, match="Mamba-1"):
        make_decimamba(mamba2, train_len=16, tail=4)


def test_reimplementations_are_named_so(tmp_path: Path) -> None:
    assert "reimplementation" in LongMamba({}, 0.1).name and "reimplementation" in MambaExtend({}).name
    assert "reimplementation" in DeciMamba((), 1, 0.5, 1).name
