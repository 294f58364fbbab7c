"""Mutates the files of a small checkpoint and checks that each is converted and proved, or refused.

    python -m benchmarks.fuzz --files 10000

A round changes one of the safetensors headers, the index or config.json, in its bytes (bits flipped, pieces cut,
doubled or replaced) or in its JSON (values replaced by others that parsers stumble over), then converts. Anything
but a proved conversion or the tool's own error is a failure, and so is a file written outside the output. Exits
with 1 at the first failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.crash_soak import state_of
from benchmarks.synthetic import write_checkpoint
from converter.commands.convert import convert
from converter.commands.requests import ConvertRequest
from converter.errors import MmodError
from converter.reporting import Reporter

HIDDEN, LAYERS = 64, 2
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1 << 40, 1 << 64, 1e300, "", "x", "F32", "BF16", "F8_E4M3", "I32", "../x", "/x"),
    *("model-00001-of-00002.safetensors", "mamba", "float16", [], {}, [0, 0], [2, 2], [[]], {"a": {}}),
)
_WORDS = (
    *(b"0", b"-1", b"1e309", b"99999999999999999999", b"18446744073709551615", b"NaN", b"null", b"true", b'""'),
    *(b"[]", b"{}", b'"F32"', b'"BF16"', b'"../x"', b'"A_log"', b'"\\u0000"', b'"shape"', b'"data_offsets"'),
    *(b'"dtype"', b'"__metadata__"', b'"weight_map"', b"\xff", b"\0", b"[", b"}", b","),
)


def mutate(data: bytes, generator: random.Random) -> bytes:
    """A copy of ``data``, a safetensors file or JSON, with one to four changes of its bytes or of its JSON."""
    for _ in range(generator.randint(1, 4)):
        data = (mutate_bytes if generator.random() < 0.4 else _mutate_json)(data, generator)
    return data


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """One change, mostly within the first kilobytes, where headers are."""
    content = bytearray(data)
    end = max(1, len(content) if generator.random() < 0.2 else min(len(content), 3000))
    start = generator.randrange(end)
    span = slice(start, start + generator.randint(1, 12))
    match generator.randrange(6):
        case 0 if content:
            content[min(start, len(content) - 1)] ^= 1 << generator.randrange(8)
        case 1:
            del content[span]
        case 2:
            content[start:start] = content[span]
        case 3:
            content[span] = generator.choice(_WORDS)
        case 4:
            del content[start:]
        case _:
            content[:8] = generator.randrange(1 << generator.choice((8, 16, 32, 64))).to_bytes(8, "little")
    return bytes(content)


def _mutate_json(data: bytes, generator: random.Random) -> bytes:
    """One value of the JSON replaced, removed or exchanged with another; the rest, lengths included, kept right."""
    is_json = data[:1] == b"{"
    end = len(data) if is_json else 8 + int.from_bytes(data[:8], "little")
    try:
        tree = json.loads(data[0 if is_json else 8 : end])
    except ValueError:
        return mutate_bytes(data, generator)
    nodes = [node for node in _containers(tree) if node]
    if nodes:
        node, other = generator.choice(nodes), generator.choice(nodes)
        key, other_key = (generator.choice(list(_keys(n))) for n in (node, other))
        match generator.randrange(4):
            case 0:
                del node[key]
            case 1:
                node[key] = copy.deepcopy(other[other_key])
            case 2 if isinstance(node[key], int):
                node[key] += generator.choice((-1, 1, 2, 1 << 31, 1 << 63, -(1 << 40)))
            case _:
                node[key] = generator.choice(_VALUES)
    header = json.dumps(tree).encode()
    return header if is_json else len(header).to_bytes(8, "little") + header + data[end:]


def _containers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _containers(child)


def _keys(node: Any) -> Iterable[Any]:
    return node if isinstance(node, dict) else range(len(node))


def fuzz(folder: Path, files: int, seed: int) -> Counter[str]:
    """Convert ``files`` mutated checkpoints below ``folder``, and count how each ended."""
    model, place = folder / "model", folder / "outputs"
    write_checkpoint(model, hidden=HIDDEN, layers=LAYERS, shards=2, vocabulary=64)
    place.mkdir()
    generator, outcomes = random.Random(seed), Counter[str]()
    targets = [path for path in sorted(model.iterdir()) if path.name != "tokenizer.json"]
    for _ in range(files):
        path = generator.choice(targets)
        honest = path.read_bytes()
        path.write_bytes(mutate(honest, generator))
        try:
            request = ConvertRequest(str(model), place / "out", 256, overwrite=True, windows=0)
            convert(replace(request, method="constant", factor=1.5), Reporter())
            outcomes[f"{path.name}: {state_of(str(model), place / 'out')}"] += 1
        except MmodError as error:
            outcomes[f"{path.name}: {type(error).__name__}"] += 1
        path.write_bytes(honest)
        strange = {entry.name for entry in place.iterdir()} - {"out"} | {entry.name for entry in folder.iterdir()}
        assert strange == {"model", "outputs"}, f"written outside the output: {strange}"
    return outcomes


def main() -> None:
    """Command line of the fuzzer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmod-fuzz-") as folder:
        outcomes = fuzz(Path(folder), options.files, options.seed)
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count:6} {outcome}\n")


if __name__ == "__main__":
    main()
