"""The GPU path on models of published shapes with random weights: time, memory, and what several cards bring.

Run one part after the other, each in its own process and in less than ten minutes, then print the table:

    python -m benchmarks.gpu mamba2 long mamba kernels nemotron calibration paper --out FOLDER
    torchrun --nproc-per-node 2 -m benchmarks.gpu cards --out FOLDER
    python -m benchmarks.gpu streamed --shape falcon_h1 --layers 72 --out FOLDER
    python -m benchmarks.gpu effect --text mansfield-park.txt --out FOLDER
    python -m benchmarks.gpu table --out FOLDER

A "forward" is the stock transformers backbone on the kernels, timed in the same process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from calibrator.activations import Activations, checkpointed
from calibrator.calibration import Problem, calibrate, prepare_calibration
from calibrator.carried_state import State
from calibrator.distributed import ALONE, Ranks, process_group
from calibrator.evaluation.perplexity import prediction_losses
from calibrator.loss import token_losses
from calibrator.methods import gradient
from calibrator.model import StockModel
from calibrator.recurrence import Recurrence
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.text import Text
from calibrator.weight_stream import MemoryMode, WeightStream, outermost_layers
from converter.commands.console import Console
from converter.commands.provenance import read_versions
from converter.reporting import Reporter

GIB = 1 << 30
K32, K128 = 32 << 10, 128 << 10
TRAIN_LEN = 2048
# A card of 16 GB has 15.9 GiB, of which the driver and the allocator's gaps take a part.
SMALL_CARD = int(14.2 * GIB)
LARGE_CARD = 76 * GIB
SHAPES: dict[str, dict[str, Any]] = {
    "mamba2": {
        "hidden_size": 2560,
        "num_hidden_layers": 64,
        "state_size": 128,
        "num_heads": 80,
        "head_dim": 64,
        "n_groups": 1,
        "vocab_size": 50288,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    },
    "mamba": {"hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16, "vocab_size": 50288},
    # Nemotron 3 Nano 30B-A3B.
    "nemotron_h": {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_hidden_layers": 52,
        "hidden_size": 2688,
        "vocab_size": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "intermediate_size": 1856,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "routed_scaling_factor": 2.5,
    },
}
NAMES = {"mamba2": "mamba2-2.7b", "mamba": "mamba-2.8b", "nemotron_h": "Nemotron 3 Nano 30B-A3B"}
# Of these, from memory and not from their files, a few layers are made and copied until there are as many as asked.
STREAMED: dict[str, dict[str, Any]] = {
    # Falcon-H1 34B.
    "falcon_h1": {
        "hidden_size": 5120,
        "num_hidden_layers": 1,
        "intermediate_size": 21504,
        "vocab_size": 261120,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "mamba_d_ssm": 4096,
        "mamba_n_heads": 32,
        "mamba_d_head": 128,
        "mamba_d_state": 256,
        "mamba_n_groups": 2,
    },
    # Qwen3-Next 80B-A3B, three layers of the delta rule to one of attention.
    "qwen3_next": {
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
}


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        must: what it has to reach, with ``reached`` for whether it did; both empty where nothing is asked.
    """

    what: str
    value: str
    must: str = ""
    reached: bool | None = None


@dataclass(frozen=True)
class Timing:
    """Median seconds of a run, and the most bytes it had allocated on the device."""

    seconds: float
    peak: int

    def text(self) -> str:
        return f"{1e3 * self.seconds:,.0f} ms, peak {self.peak / GIB:.1f} GiB"


def timed(run: Callable[[], object], repeats: int, warm_ups: int = 1) -> Timing:
    """Time a run on the GPU."""
    for _ in range(warm_ups):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return Timing(statistics.median(seconds), torch.cuda.max_memory_allocated())


def random_model(model_type: str) -> StockModel:
    """A published shape with random weights in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPES[model_type])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    mixers = {f"{name}.A_log": module for name, module in model.named_modules() if "A_log" in module._parameters}
    A_log = {key: mixer.get_parameter("A_log").detach().float() for key, mixer in mixers.items()}
    return StockModel(model, None, mixers, A_log, torch.bfloat16, Recurrence(model, mixers))


def noise(stock: StockModel, length: int, count: int = 1) -> Tensor:
    """(count, length) random tokens on the CPU."""
    return torch.randint(stock.vocab_size, (count, length), generator=torch.Generator().manual_seed(1))


def forward(stock: StockModel, length: int, repeats: int = 3) -> Timing:
    """The stock backbone in evaluation mode, with nothing of ours in it."""
    tokens = noise(stock, length).cuda()
    with torch.no_grad():
        return timed(lambda: stock.hidden_states(tokens), repeats)


def step(stock: StockModel, tokens: Tensor) -> Tensor:
    """The loss whose gradient a step wants."""
    return token_losses(stock, stock.hidden_states(tokens[:, :-1]), tokens[:, 1:]).mean()


def gradient_step(
    stock: StockModel, length: int, mode: MemoryMode, budget: int | None, repeats: int = 3
) -> tuple[Timing, str]:
    """One gradient over one window, and what the layers kept for it."""
    tokens = noise(stock, length + 1).cuda()
    plans: list[str] = []

    class PlanReporter(Reporter):
        def line(self, text: str) -> None:
            plans.append(text.partition(": ")[2].rstrip("."))

        def warn(self, text: str) -> None:
            plans.append(text)

    granularity = "head" if next(iter(stock.A_log.values())).ndim == 1 else "channel"
    with Scaling(stock.mixers, stock.A_log, granularity, "linear") as scaling, stock.recurrence:  # type: ignore[arg-type]
        activations = Activations(stock, scaling.parameters(), mode, PlanReporter(), budget)

        def run() -> None:
            for parameter in scaling.parameters():
                parameter.grad = None
            activations.backward(length, partial(step, stock, tokens))

        timing = timed(run, repeats, warm_ups=2)
        assert all(bool(p.grad.isfinite().all()) for p in scaling.parameters() if p.grad is not None)
    return timing, "; ".join(plans)


def step_findings(
    name: str,
    what: str,
    stock: StockModel,
    base: Timing,
    length: int,
    budget: int | None,
    must: tuple[float, float],
) -> list[Finding]:
    """A gradient step with memory chosen by itself, in forwards and GiB."""
    timing, plan = gradient_step(stock, length, "auto", budget, repeats=3 if length == K32 else 1)
    forwards, peak = timing.seconds / base.seconds, timing.peak / GIB
    return [
        Finding(
            f"{name}, {what}",
            f"{forwards:.2f} forwards, {timing.text()} ({plan})",
            f"{must[0]} forwards, {must[1]} GiB",
            forwards <= must[0] and peak <= must[1],
        )
    ]


def mamba2(_: argparse.Namespace) -> list[Finding]:
    """The 2.7b shape at 32k: forward, evaluation, gradient steps."""
    stock, name = random_model("mamba2"), NAMES["mamba2"]
    base = forward(stock, K32, repeats=5)
    findings = [Finding(f"{name}, 32k, forward", base.text())]
    windows = noise(stock, K32)
    with torch.no_grad(), stock.recurrence:
        evaluation = timed(lambda: prediction_losses(stock, windows), 5)
    share, peak = base.seconds / evaluation.seconds, evaluation.peak / GIB
    findings.append(
        Finding(
            f"{name}, 32k, evaluation",
            f"{share:.2f} of the forward's tokens per second, {evaluation.text()}",
            "0.92, 9 GiB",
            share >= 0.92 and peak <= 9,
        )
    )
    small = step_findings(name, "32k, gradient step, 16 GB card", stock, base, K32, SMALL_CARD, (4.6, 14.5))
    large = step_findings(name, "32k, gradient step, whole card", stock, base, K32, None, (4.2, 76.0))
    findings += small + large
    for mode in ("checkpoint", "offload"):
        timing, _plan = gradient_step(stock, K32, mode, None)  # type: ignore[arg-type]
        forwards = timing.seconds / base.seconds
        findings.append(Finding(f"{name}, 32k, --memory {mode}", f"{forwards:.2f} forwards, {timing.text()}"))
    return findings


def long(_: argparse.Namespace) -> list[Finding]:
    """The 2.7b shape at 128k: in one pass, and in pieces with a carried state."""
    stock, name = random_model("mamba2"), NAMES["mamba2"]
    base = forward(stock, K128, repeats=2)
    findings = [Finding(f"{name}, 128k, forward", base.text())]
    findings += step_findings(name, "128k, gradient step", stock, base, K128, None, (4.6, 76.0))
    what = f"{name}, 128k in pieces of 32k with the state carried, 16 GB card"
    return [*findings, in_pieces(what, stock, base, K128, K32, SMALL_CARD)]


def in_pieces(what: str, stock: StockModel, base: Timing, length: int, piece: int, budget: int) -> Finding:
    """The gradients of all pieces of one text, each from the state and the keys of the one before it."""
    tokens = noise(stock, length + 1).cuda()
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        activations = Activations(stock, scaling.parameters(), "auto", Reporter(), budget)

        def run() -> None:
            state: State | None = None
            for start in range(0, length, piece):
                carried = partial(stock.recurrence.carried, state)
                loss = partial(step, stock, tokens[:, start : start + piece + 1])
                _, state = activations.backward(piece, loss, carried)

        timing = timed(run, 1)
    return Finding(what, f"{timing.seconds / base.seconds:.2f} forwards, {timing.text()}")


def mamba(_: argparse.Namespace) -> list[Finding]:
    """The 2.8b shape of Mamba-1 at 32k."""
    stock, name = random_model("mamba"), NAMES["mamba"]
    base = forward(stock, K32, repeats=5)
    findings = [Finding(f"{name}, 32k, forward", base.text())]
    findings += step_findings(name, "32k, gradient step, 16 GB card", stock, base, K32, SMALL_CARD, (4.9, 14.5))
    timing, plan = gradient_step(stock, K32, "auto", None)
    forwards = timing.seconds / base.seconds
    what = f"{name}, 32k, gradient step, whole card"
    findings.append(Finding(what, f"{forwards:.2f} forwards, {timing.text()} ({plan})"))
    return findings


def kernels(_: argparse.Namespace) -> list[Finding]:
    """The kernels of a whole mixer and those of its steps, on both shapes."""
    return [
        finding
        for model_type in ("mamba2", "mamba")
        for finding in fused_or_not(random_model(model_type), NAMES[model_type])
    ]


def nemotron(_: argparse.Namespace) -> list[Finding]:
    """The 30B-A3B shape of a hybrid with experts at 32k, within a card of 80 GB."""
    stock, name = random_model("nemotron_h"), NAMES["nemotron_h"]
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, 79 * GIB / torch.cuda.get_device_properties(0).total_memory)
    )
    weights = torch.cuda.memory_allocated() / GIB
    base = forward(stock, K32)
    return [
        Finding(f"{name}, 32k, forward", f"{base.text()}, of which weights {weights:.1f} GiB"),
        *step_findings(name, "32k, gradient step, 80 GB card", stock, base, K32, LARGE_CARD, (6.0, 79.0)),
        in_pieces(f"{name}, 32k in pieces of 8k, 80 GB card", stock, base, K32, K32 // 4, LARGE_CARD),
    ]


def streamed_model(model_type: str, layers: int) -> StockModel:
    """A published width with random weights in bfloat16, those of its layers in host memory."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **STREAMED[model_type])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    few = outermost_layers(model)
    [stack] = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and list(m) == few]
    originals = [layer.cpu() for layer in few]
    stack.extend(copy.deepcopy(originals[index % len(few)]) for index in range(len(few), layers))
    config.num_hidden_layers = layers
    if kinds := vars(config).get("layer_types"):
        config.layer_types = [kinds[index % len(few)] for index in range(layers)]
    weights = WeightStream(model, torch.device("cuda"))
    mixers = {f"{name}.A_log": module for name, module in model.named_modules() if "A_log" in module._parameters}
    A_log = {key: mixer.get_parameter("A_log").detach().float() for key, mixer in mixers.items()}
    return StockModel(model, None, mixers, A_log, torch.bfloat16, Recurrence(model, mixers), weights=weights)


def host_bandwidth() -> float:
    """Bytes a second from page-locked host memory to the GPU, with nothing else going on."""
    block = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(block, device="cuda")
    return GIB / timed(lambda: there.copy_(block, non_blocking=True), 5).seconds


def streamed(arguments: argparse.Namespace) -> list[Finding]:
    """A gradient step at 32k whose layers' weights come from host memory, each of them twice."""
    stock = streamed_model(arguments.shape, arguments.layers)
    assert stock.weights is not None
    kept = torch.cuda.memory_allocated() / GIB
    bandwidth = host_bandwidth()
    timing, _ = gradient_step(stock, K32, "stream", None)
    with torch.no_grad():
        forward_seconds = forward(stock, K32, 2).seconds
    # The last layer is still there when the backward pass begins, the first when the next step does.
    moved = 2 * stock.weights.nbytes * (arguments.layers - 1) / arguments.layers
    rate, peak = moved / timing.seconds, timing.peak / GIB
    what = f"{arguments.shape}, {arguments.layers} layers, 32k, gradient step, weights from host memory"
    value = (
        f"{timing.seconds:.2f} s (forward {forward_seconds:.2f} s), peak {peak:.1f} GiB, {kept:.1f} of it always; "
        f"{stock.weights.nbytes / GIB:.1f} GiB on the host, moved at {rate / 1e9:.1f} GB/s of {bandwidth / 1e9:.1f}"
    )
    return [Finding(what, value, "76 GiB, half of the bandwidth or bound by compute", peak <= 76)]


def fused_or_not(stock: StockModel, name: str) -> list[Finding]:
    """A gradient over 16k tokens with every layer run twice."""
    tokens = noise(stock, K32 // 2 + 1).cuda()
    findings = []
    for what, fused, ours in (
        ("step by step", False, False),
        ("whole mixer", True, False),
        ("chosen", False, True),
    ):
        with Scaling(stock.mixers, stock.A_log, "layer", "linear"), stock.recurrence if ours else nullcontext():
            for mixer in stock.mixers.values():
                mixer.training = mixer.training or fused

            def run() -> None:
                with checkpointed(stock):
                    step(stock, tokens).backward()  # type: ignore[no-untyped-call]

            timing = timed(run, 2)
            for mixer in stock.mixers.values():
                mixer.training = mixer.training and ours
        findings.append(Finding(f"{name}, 16k, gradient step, kernels {what}", timing.text()))
    return findings


def noise_problem(stock: StockModel, settings: Settings, ranks: Ranks = ALONE) -> Problem:
    """A calibration on random tokens, in two documents of half a million."""
    text = Text("noise", tuple(noise(stock, 1 << 20).reshape(2, -1)))
    problem = prepare_calibration(stock, [text], settings, Console(quiet=True), "random weights", ranks=ranks)
    # All of it is timed, so it must not go on where an earlier run stopped.
    problem.journal.remove()
    return problem


def calibration(_: argparse.Namespace) -> list[Finding]:
    """The whole default calibration of the 2.7b shape for 32k, after tuning."""
    stock = random_model("mamba2")
    problem = noise_problem(stock, Settings("gradient", "head", "linear", TRAIN_LEN, K32, load_dtype="bfloat16"))
    with problem.scaling, stock.recurrence:
        problem.activations.warm_up()
    torch.cuda.reset_peak_memory_stats()
    found = calibrate(problem).record
    peak = torch.cuda.max_memory_allocated() / GIB
    value = f"{found.seconds:.0f} s for {found.steps} steps and {len(found.history)} validations"
    what = f"{NAMES['mamba2']}, default calibration for 32k"
    return [Finding(what, f"{value}, peak {peak:.1f} GiB", "240 s", found.seconds <= 240)]


def paper(_: argparse.Namespace) -> list[Finding]:
    """The paper's setting, two of its thirty steps, and one validation."""
    stock = random_model("mamba2")
    settings = Settings("spsa", "layer", "linear", TRAIN_LEN, K32, preset="paper", steps=2, load_dtype="bfloat16")
    problem = noise_problem(stock, settings)
    with problem.scaling, stock.recurrence:
        problem.activations.warm_up()
        started = time.perf_counter()
        problem.validation.begin()
        judgement = time.perf_counter() - started
        window = noise(stock, K32, 20)
        started = time.perf_counter()
        with torch.no_grad():
            for row in [*window, *window] * 2:
                prediction_losses(stock, row[None])
        steps = (time.perf_counter() - started) / 2
    total = 30 * (steps + judgement)
    value = f"{total:,.0f} s: 30 times ({steps:.1f} s for 40 windows + {judgement:.1f} s for a validation)"
    return [Finding(f"{NAMES['mamba2']}, the paper's setting at 32k", value)]


def cards(_: argparse.Namespace) -> list[Finding]:
    """Windows per second of the gradient method, with as many windows on each card."""
    with process_group("auto") as ranks:
        stock = random_model("mamba2")
        settings = Settings(
            "gradient",
            "head",
            "linear",
            TRAIN_LEN,
            K32,
            validations=0,
            streams=ranks.size,
            short_windows=8 * ranks.size,
        )
        rates = []
        for steps in (2, 6):
            problem = noise_problem(stock, dataclasses.replace(settings, steps=steps), ranks)
            with problem.scaling, stock.recurrence:
                problem.validation.begin()
                torch.cuda.synchronize()
                started = time.perf_counter()
                gradient.calibrate(problem)
                torch.cuda.synchronize()
                rates.append(steps * (settings.streams + settings.short_windows) / (time.perf_counter() - started))
        return [Finding(f"{NAMES['mamba2']}, windows per second on {ranks.size} GPU", f"{rates[-1]:.3f}")]


def effect(arguments: argparse.Namespace) -> list[Finding]:
    """Both demo checkpoints calibrated for 64k by the real command, read on a held-out novel."""
    limits = {"demo": (0.95, 1.01), "demo:mamba": (1.15, 1.1)}
    texts = Path(__file__).parent.parent / "converter" / "demo" / "texts"
    findings = []
    for demo, (long_limit, longer_limit) in limits.items():
        output = arguments.out / demo.replace(":", "-")
        command = [sys.executable, "-m", "converter", demo, "--target-len", "64k", "--held-out", arguments.text]
        command += ["--data", str(texts / "persuasion.txt"), "--data", str(texts / "northanger-abbey.txt")]
        subprocess.run([*command, "-o", str(output), "--overwrite"], check=True)
        table = json.loads((output / "mmod.json").read_text())["perplexity"]
        base, after = table["base"], table["converted"]
        ratios = (after["65536"] / after["256"], after["131072"] / after["65536"], after["256"] / base["256"] - 1)
        before = (base["65536"] / base["256"], base["131072"] / base["65536"])
        findings.append(
            Finding(
                f"{demo}: 64k over own 256, 128k over 64k, 256 against as trained",
                f"{ratios[0]:.3f}, {ratios[1]:.3f}, {ratios[2]:+.2%} (as trained {before[0]:.2f}, {before[1]:.2f})",
                f"{long_limit}, {longer_limit}, +0.5 %",
                ratios[0] <= long_limit and ratios[1] <= longer_limit and ratios[2] <= 0.005,
            )
        )
    return findings


PARTS: dict[str, Callable[[argparse.Namespace], list[Finding]]] = {
    "mamba2": mamba2,
    "long": long,
    "mamba": mamba,
    "kernels": kernels,
    "nemotron": nemotron,
    "streamed": streamed,
    "calibration": calibration,
    "paper": paper,
    "cards": cards,
    "effect": effect,
}


def write(part: str, findings: list[Finding], folder: Path) -> None:
    """Keep what a part found, with the machine and the versions it was found on."""
    gpus = torch.cuda.device_count() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 1
    record = {
        "machine": f"{gpus} x {torch.cuda.get_device_name()}",
        "versions": read_versions(),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu-{part}-{gpus}.json").write_text(json.dumps(record, indent=1))


def table(folder: Path) -> str:
    """All findings in a folder as Markdown."""
    lines = ["| what | measured | must reach | |", "|---|---|---|---|"]
    for path in sorted(folder.glob("gpu-*.json")):
        for row in json.loads(path.read_text())["findings"]:
            mark = {True: "yes", False: "no", None: ""}[row["reached"]]
            lines.append(f"| {row['what']} | {row['value']} | {row['must']} | {mark} |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts named, or print the table of those that were run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "table"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--text", help="held-out novel for effect")
    parser.add_argument("--shape", choices=STREAMED, default="falcon_h1", help="for streamed")
    parser.add_argument("--layers", type=int, default=72, help="for streamed")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part == "table":
            sys.stdout.write(table(arguments.out) + "\n")
            continue
        findings = PARTS[part](arguments)
        gc.collect()
        torch.cuda.empty_cache()
        if int(os.environ.get("RANK", "0")) == 0:
            write(part, findings, arguments.out)
            sys.stdout.write("\n".join(f"{f.what}: {f.value}" for f in findings) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
