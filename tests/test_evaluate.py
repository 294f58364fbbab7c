"""mmod evaluate and the paper's measures through their real commands: JSON and errors, and the loss behind them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from typer.testing import CliRunner

from benchmarks import measures
from benchmarks.pictures import draw_pictures
from calibrator.evaluation.perplexity import (
    how_measured,
    mean_by_position,
    measure_lengths,
    tail_losses,
    take_ends,
)
from calibrator.loss import window_losses
from calibrator.model import StockModel, require_finite
from calibrator.text import Text
from converter.commands.cli import app
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import CalibrationError, MmodError, SourceError, TextError, UsageError
from converter.json_text import json_text
from hub_cards.report import report_html
from tests.measured_models import QUIET, demo_folder, random_tokens, tiny_stock
from tests.tiny_folders import tiny_folder


def evaluate(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["evaluate", *words, "--json", "-q"])
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def measure(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(measures.app, [*words, "--json", "-q"])
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def refused(*words: str) -> UsageError:
    result = CliRunner().invoke(app, ["evaluate", *words, "-q"])
    assert isinstance(result.exception, UsageError), result.output
    return result.exception


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comparison")
    scaled = demo_folder("demo", folder / "scaled", factor=3.0)
    words = ("--lengths", "128,512", "--windows", "1", "--comparator", "longmamba", "--train-len", "16")
    record = measure("demo", str(scaled), *words, "--output", str(folder / "result"))
    return folder / "result", record


def test_one_model_has_perplexity_at_the_top_level() -> None:
    record = evaluate("demo", "--lengths", "128,512", "--windows", "1")
    assert list(record["perplexity"]) == ["128", "512"]
    assert list(record["by_position"]) == ["256", "512"]
    assert all(20 < value < 200 for value in record["perplexity"].values())
    assert record["span_tokens"] == 512 and record["seed"] == 0 and record["device"] == "cpu"
    assert record["text"]["name"] == "northanger-abbey.txt (unwrapped)" and len(record["text"]["sha256"]) == 64
    assert {"torch", "transformers", "mmod-convert"} <= record["versions"].keys()
    page = report_html({}, {Path("one.json"): record})
    assert f"demo, 512 tokens: {record['perplexity']['512']:.2f}" in page


def test_what_was_measured_before_a_model_fails_is_kept(tmp_path: Path) -> None:
    words = ["demo", "no/such/folder", "--lengths", "128", "--windows", "1", "-q", "--json"]
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert isinstance(result.exception, SourceError)
    record = json.loads(result.stdout)
    paper = CliRunner().invoke(measures.app, [*words, "--output", str(tmp_path / "result")])
    assert isinstance(paper.exception, SourceError)
    written = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    assert written["models"] == record["models"]
    [entry] = record["models"]
    assert entry["model"] == "demo" and 20 < entry["perplexity"]["128"] < 200


def test_figures_that_json_has_no_number_for_are_written_by_name() -> None:
    """A model that breaks down at a length has a perplexity of infinity, or none."""

    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = {"task": "perplexity", "models": [], "text": None, "history": (math.nan, {"8k": math.inf}, 2.5)}
    read = json.loads(json_text(record), parse_constant=no_number)
    assert read["history"] == ["NaN", {"8k": "Infinity"}, 2.5]


def test_several_models_give_one_comparison(comparison: tuple[Path, dict[str, Any]]) -> None:
    folder, record = comparison
    names = [entry["model"] for entry in record["models"]]
    assert names == ["demo", "demo + LongMamba (reimplementation)", "scaled"]
    assert "perplexity" not in record
    base, longmamba, scaled = (entry["perplexity"]["512"] for entry in record["models"])
    assert longmamba != base and scaled > base
    assert record["models"][1]["comparator"]["global_decay"] > 0
    assert json.loads((folder / "evaluation.json").read_text()) == record


def test_pictures_are_drawn_from_the_json_alone(comparison: tuple[Path, dict[str, Any]]) -> None:
    folder, record = comparison
    pictures = draw_pictures(json.loads(json.dumps(record)))
    assert [picture.path for picture in pictures] == ["perplexity.png", "position.png"]
    for picture in pictures:
        assert picture.png == (folder / picture.path).read_bytes()
        assert "demo from" in picture.alt and "LongMamba (reimplementation) from" in picture.alt


@pytest.mark.parametrize("task", ["tail", "recall", "state-norm", "spectrum", "passkey"])
def test_every_task_writes_json_and_pictures(task: str, tmp_path: Path) -> None:
    words = {
        "tail": ("--windows", "1", "--tail", "32"),
        "passkey": ("--samples", "1", "--depth", "0.5"),
        "recall": ("--samples", "1", "--distances", "64", "--kind", "slice"),
    }
    lengths = ("--lengths", "128,256")
    record = measure(
        "demo", "--task", task, *lengths, *words.get(task, ("--windows", "1")), "--output", str(tmp_path)
    )
    assert record["task"] == task
    assert record["models"][0]["text"]["tokens"] > 0
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == record
    pictures = draw_pictures(written)
    assert pictures and all((tmp_path / picture.path).read_bytes() == picture.png for picture in pictures)


def test_recall_is_told_by_kind_length_and_distance() -> None:
    """A distance beyond a length is left out there; a model that copies finds a key that a prose model does not."""
    words = ("--task", "recall", "--lengths", "128,256", "--distances", "32,192", "--samples", "2")
    record = evaluate("demo:recall", "demo", *words, "--kind", "pass key", "--kind", "random span")
    assert record["settings"]["kind"] == ["pass key", "random span"] and record["text"]["role"] == "filler"
    copies, prose = (entry["cells"] for entry in record["models"])
    places = [(cell["kind"], cell["length"], cell["distance"]) for cell in copies]
    assert sorted(places) == sorted(
        (kind, *place) for kind in ("pass key", "random span") for place in ((128, 32), (256, 32), (256, 192))
    )
    assert places == [(cell["kind"], cell["length"], cell["distance"]) for cell in prose]
    assert all(cell["samples"] == 2 and 0 <= cell["low"] <= cell["high"] <= 1 for cell in copies + prose)
    keys = [[cell["found"] for cell in cells if cell["kind"] == "pass key"] for cells in (copies, prose)]
    assert sum(keys[0]) >= 5 and max(keys[1]) == 0
    page = report_html({}, {Path("recall.json"): record})
    assert all(f"{model}, 192 back, 256: " in page for model in ("demo:recall", "demo"))
    assert f"demo, 32 back, 256: {0:.0%} (95 %: 0% to {prose[0]['high']:.0%}), 2 prompts" in page
    assert "pass key" in refused("demo", "--task", "recall", "--lengths", "128", "--kind", "rumour").fix


def test_figures_are_those_of_the_stock_forward_pass(tmp_path: Path) -> None:
    stock = tiny_stock("mamba2", tmp_path)
    span = random_tokens(2, 64)
    with torch.no_grad():
        logits = stock.model(span).logits[:, :-1].float()
        exact = functional.cross_entropy(logits.flatten(0, 1), span[:, 1:].flatten(), reduction="none").view(2, -1)
    with stock.recurrence:
        [short, long] = measure_lengths(stock, span, [16, 64], QUIET, "model")
        near, far = (tail_losses(stock, span[:, -length:], 5) for length in (16, 64))
    assert long.perplexity == pytest.approx(math.exp(float(exact.mean())), rel=1e-4)
    assert short.losses.shape == (8,)
    torch.testing.assert_close(far, exact[:, -5:].mean(1).double(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(near, far)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "bamba", "qwen3_next"])
def test_long_pass_is_held_against_carried_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    stock = tiny_stock(model_type, tmp_path)
    span = random_tokens(1, 4096)

    def wrong(stock: StockModel, windows: torch.Tensor) -> torch.Tensor:
        return window_losses(stock, windows) * 1.01

    with stock.recurrence:
        results = measure_lengths(stock, span, [512, 1024, 4096], QUIET, "model")
        monkeypatch.setattr("calibrator.evaluation.perplexity.window_losses", wrong)
        measure_lengths(stock, span, [512, 4096], QUIET, "model")
        with pytest.raises(CalibrationError, match="one of the kernels goes wrong"):
            measure_lengths(stock, span, [1024], QUIET, "model")
    assert [entry.difference is None for entry in results] == [True, False, True]
    said = how_measured(results)
    assert "Up to 1,024 tokens a window ran in one pass" in said and "the same within 0.00%" in said
    assert "Longer windows ran in pieces of 2,048 tokens" in said


def test_buckets_cover_every_prediction_once() -> None:
    losses = torch.rand(3, 1023, dtype=torch.float64)
    buckets = mean_by_position(losses)
    assert list(buckets) == [256, 512, 1024]
    weighted = buckets[256] * 255 + buckets[512] * 256 + buckets[1024] * 512
    assert weighted / 1023 == pytest.approx(float(losses.mean()))
    assert buckets[256] == pytest.approx(float(losses[:, :255].mean()))
    assert list(mean_by_position(torch.rand(1, 100))) == [256]


def test_windows_for_tails_end_at_the_same_places() -> None:
    document = torch.arange(1000)
    windows = take_ends(Text("counting", (document[:10], document)), 400, 3)
    assert windows[:, -1].tolist() == [399, 699, 999]
    assert windows.shape == (3, 400)
    with pytest.raises(TextError, match="1000 tokens; 1001"):
        take_ends(Text("counting", (document,)), 1001, 2)


@pytest.mark.parametrize(
    ("words", "option", "fix"),
    [
        (("--samples", "1"), "--samples", "recall"),
        (("--task", "recall", "--windows", "1"), "--windows", "perplexity"),
        (("demo:mamba", "--revision", "main"), "--revision", "one by one"),
    ],
)
def test_option_without_a_use_is_refused(words: tuple[str, ...], option: str, fix: str) -> None:
    error = refused("demo", *words)
    assert option in error.message and fix in error.fix


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("no/such/novel.txt", TextError, "There is no text no/such/novel.txt"),
        (f"{HELD_OUT_NOVEL}=2", UsageError, "has the weight 2"),
    ],
)
def test_text_that_cannot_be_read_as_asked_is_refused_before_a_model(
    text: str, error: type[MmodError], said: str
) -> None:
    done = CliRunner().invoke(app, ["evaluate", "./no-model", "--text", text])
    assert isinstance(done.exception, error) and said in done.exception.message


def test_bad_options_say_what_to_do() -> None:
    assert "pass key" in refused("demo", "--task", "recall", "--kind", "speed").fix
    assert "divide" in refused("demo", "--lengths", "100,256").fix
    unknown = CliRunner().invoke(app, ["evaluate", "demo", "--task", "speed"])
    assert unknown.exit_code == 2 and "perplexity" in unknown.output


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("demo:mamba", "--comparator", "decimamba", "--train-len", "256"), "--task tail"),
        (("demo", "--comparator", "shortmamba"), "longmamba"),
        (("demo", "--comparator", "constant-A=x"), "constant-A=1.5"),
        (("demo", "--task", "passkey", "--comparator", "longmamba"), "perplexity, tail"),
        (("demo", "--task", "tail", "--lengths", "128", "--tail", "128"), "--tail"),
    ],
)
def test_bad_options_of_the_papers_measures_say_what_to_do(words: tuple[str, ...], fix: str) -> None:
    error = CliRunner().invoke(measures.app, [*words, "-q"]).exception
    assert isinstance(error, UsageError) and fix in error.fix


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("evaluate", "demo", "--task", "recall", "--lengths", "8", "--samples", "1"),
            "No fact fits into 8 tokens",
        ),
        (("diagnose", "demo", "--train-len", "1"), "one token holds no prediction"),
        (("convert", "demo", "--train-len", "1"), "one token holds no prediction"),
    ],
)
def test_lengths_in_which_nothing_can_be_measured_are_refused(words: tuple[str, ...], said: str) -> None:
    error = CliRunner().invoke(app, [*words, "-q"]).exception
    assert isinstance(error, UsageError) and said in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("words", [("evaluate", "--lengths", "64", "--windows", "1"), ("diagnose",)])
def test_weight_that_is_not_finite_is_named_in_place_of_figures(
    words: tuple[str, ...], value: float, tmp_path: Path
) -> None:
    model = tiny_folder("mamba2", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "backbone.layers.1.mixer.in_proj.weight"
    tensors[name][0, 0] = value
    save_file(tensors, model / "model.safetensors")
    error = CliRunner().invoke(app, [words[0], str(model), *words[1:], "-q"]).exception
    assert isinstance(error, CalibrationError)
    assert error.message == f"The weight {name} holds NaN or infinity." and "damaged" in error.fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_every_format_are_looked_at(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(2, 2).to(dtype)
    require_finite(module)
    module.weight.data = torch.full((2, 2), float("nan")).to(dtype)
    if dtype.itemsize == 1:
        require_finite(module)
        return
    with pytest.raises(CalibrationError, match="The weight weight holds NaN"):
        require_finite(module)
