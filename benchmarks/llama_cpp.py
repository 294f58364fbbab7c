"""Perplexity by window length in llama.cpp itself, of a model as trained and converted, beside stock transformers'.

    python -m benchmarks.llama_cpp CONVERTED... --programs BUILD/bin --text mansfield-park.txt --out FOLDER

Needs `make consumers`, and llama-perplexity, llama-quantize and llama-server, built from the sources that come
with llama-cpp-python. Each converted folder and its source become GGUF files in F32, Q8_0 and Q4_K_M; `mmod bake`
scales the source's, and each result is compared with the converted folder's own: every tensor, and all logits after
prompts of up to 42,000 tokens to llama-server. Every length tiles 65,536 tokens and all predictions of a window
count, as in `mmod evaluate`; by itself llama-perplexity counts the second half.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import torch
import typer

from benchmarks.files import _MMOD
from calibrator.evaluation.perplexity import measure_lengths
from calibrator.line_ends import unwrap
from calibrator.model import load_model
from calibrator.text import TextSource, read_text
from converter.commands.opening import write_working_copy
from converter.layouts import read_checkpoint
from converter.lengths import format_length
from converter.manifest import Manifest
from converter.reporting import Reporter
from converter.source import resolve
from hub_cards.serving import llama_server
from hub_cards.templates import markdown_table

LENGTHS = (256, 4096, 16384, 65536)
FORMATS = ("F32", "Q8_0", "Q4_K_M")
PROMPT_CHARACTERS = (1_000, 30_000, 150_000)
_TRIES = 9


@dataclass(frozen=True)
class Programs:
    """The programs of one build of llama.cpp."""

    folder: Path
    threads: int

    def perplexity(self, model: Path, text: Path, length: int) -> float:
        """Over 65,536 tokens in windows of ``length``, all of whose predictions count."""
        stride = length - 1
        # In batches of unequal size this mode is wrong by 4 % at 256: it has a long context's perplexity there.
        batch = ("-b", str(min(length // 2, 2048)), "-t", str(self.threads))
        window = ("-c", str(length - stride // 2), "--ppl-stride", str(stride), *batch)
        chunks = LENGTHS[-1] // length
        # Its log is written by a thread that it does not always wait for, so the last figures can be missing.
        run = chunks + (chunks > 1)
        words = ("-m", str(model), "-f", str(text), *window, "--chunks", str(run))
        for _ in range(_TRIES):
            if found := re.search(rf"\[{chunks}\]([\d.]+),", self._run("llama-perplexity", *words)):
                return float(found[1])
        raise RuntimeError(f"llama-perplexity gives no figure for chunk {chunks}; is the text too short?")

    def quantise(self, model: Path, target: Path, number_format: str) -> None:
        """Write a file in F32 in another number format."""
        self._run("llama-quantize", str(model), str(target), number_format)

    def _run(self, program: str, *words: str) -> str:
        done = subprocess.run([self.folder / program, *words], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    @contextmanager
    def serving(self, model: Path, length: int) -> Iterator[Callable[[str], dict[str, Any]]]:
        """A server started by the line that cards have; gives a function that completes a prompt by one token."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        program, *words = shlex.split(llama_server(str(model), length))
        process = subprocess.Popen(
            [self.folder / program, *words, "--port", str(port), "-t", str(self.threads)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def complete(prompt: str) -> dict[str, Any]:
            body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 1 << 20}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as response:
                answer: dict[str, Any] = json.load(response)
            return answer

        try:
            while not _is_ready(port):
                assert process.poll() is None, "llama-server ended"
                time.sleep(0.2)
            yield complete
        finally:
            process.terminate()
            process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def stock_perplexity(folder: Path, text: Path) -> list[float]:
    """The same windows in stock transformers, in float32."""
    checkpoint = read_checkpoint(resolve(str(folder), compose=True))
    stock = load_model(folder, checkpoint.A_log, device=torch.device("cpu"), dtype=torch.float32)
    [tokens] = read_text(TextSource(str(text)), stock.tokenizer, limit=LENGTHS[-1]).documents
    with stock.recurrence, torch.no_grad():
        measured = measure_lengths(stock, tokens[None], LENGTHS, Reporter(), folder.name, compare=False)
    return [result.perplexity for result in measured]


def difference(found: Path, expected: Path) -> float:
    """The largest relative difference in any ``ssm_a``; all other tensors must be the same bytes."""
    one, other = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors} for file in (found, expected)
    )
    assert one.keys() == other.keys()
    largest = 0.0
    for name, values in one.items():
        if name.endswith("ssm_a"):
            largest = max(largest, float(np.abs(values / other[name] - 1).max()))
        else:
            np.testing.assert_array_equal(values, other[name], err_msg=name)
    return largest


def measure(converted: Path, programs: Programs, text: Path, out: Path) -> dict[str, Any]:
    """All figures of one converted folder."""
    manifest = Manifest.read(converted)
    assert manifest is not None
    name = converted.name
    result: dict[str, Any] = {"model": manifest.source.name, "differences": {}, "perplexity": {}, "server": {}}
    with tempfile.TemporaryDirectory() as temporary:
        source = write_working_copy(read_checkpoint(resolve(manifest.source.name)), Path(temporary), Reporter())
        for kind, folder in (("trained", source), ("converted", converted)):
            result["perplexity"][f"transformers, {kind}"] = stock_perplexity(folder, text)
            words = (str(folder), str(out / f"{name}-{kind}-F32.gguf"))
            subprocess.run([sys.executable, "-m", "tests.consumers.run_llama_cpp", *words], check=True)
    for number_format in FORMATS:
        trained, expected = (out / f"{name}-{kind}-{number_format}.gguf" for kind in ("trained", "converted"))
        for file in (trained, expected):
            if number_format != "F32":
                programs.quantise(Path(str(file).replace(number_format, "F32")), file, number_format)
        baked = out / f"{name}-baked-{number_format}"
        words = ("bake", str(trained), str(baked), "--scales", str(converted), "--quiet", "--overwrite")
        subprocess.run([sys.executable, "-c", _MMOD, *words], check=True)
        scaled = baked / trained.name
        result["differences"][number_format] = difference(scaled, expected)
        for kind, file in (("trained", trained), ("converted", scaled)):
            found = [programs.perplexity(file, text, length) for length in LENGTHS]
            result["perplexity"][f"{number_format}, {kind}"] = found
        result["server"][number_format] = ask(programs, scaled, expected, text)
    return result


def ask(programs: Programs, scaled: Path, expected: Path, text: Path) -> list[dict[str, Any]]:
    """What the server says after prompts with the file scaled in place and with the converted folder's."""
    prompts = [text.read_text()[:size] for size in PROMPT_CHARACTERS]
    answers = []
    for file in (scaled, expected):
        with programs.serving(file, LENGTHS[-1]) as complete:
            answers.append([complete(prompt) for prompt in prompts])
    return [_compare(*pair) for pair in zip(*answers, strict=True)]


def _compare(answer: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    logs = [
        {token["id"]: token["logprob"] for token in said["completion_probabilities"][0]["top_logprobs"]}
        for said in (answer, other)
    ]
    assert logs[0].keys() == logs[1].keys()
    return {
        "prompt_tokens": answer["tokens_evaluated"],
        "said": answer["content"],
        "tokens_compared": len(logs[0]),
        "largest_difference_of_logprobs": max(abs(logs[0][token] - logs[1][token]) for token in logs[0]),
    }


def main(
    converted: list[Path],
    programs: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    unwrapped: Annotated[bool, typer.Option(help="Take hard line ends out, as calibration does.")] = False,
    threads: int = 1,
) -> None:
    """Measure every folder, write FOLDER.json for each and print one table."""
    out.mkdir(parents=True, exist_ok=True)
    content = text.read_text()
    text = out / "text.txt"
    text.write_text(unwrap(content) if unwrapped else content)
    rows = []
    for folder in converted:
        result = measure(folder, Programs(programs, threads), text, out)
        (out / f"{folder.name}.json").write_text(json.dumps(result, indent=2))
        for name, figures in result["perplexity"].items():
            ratio = figures[-1] / figures[0]
            rows.append((f"{result['model']}: {name}", *(f"{figure:.2f}" for figure in figures), f"{ratio:.3f}"))
    sys.stdout.write(markdown_table(("", *map(format_length, LENGTHS), "64k / 256"), rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
