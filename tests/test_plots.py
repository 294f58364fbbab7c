"""The card's pictures, drawn from real converted folders and read back as pixels."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from converter.manifest import SCALES_NAME, MemoryCell, MemoryTable
from converter.scales import Granularity, ScaleSet
from hub_cards.plots import Picture, draw_pictures
from tests.converted_folder import MEMORY, PERPLEXITY, convert
from tests.small_checkpoints import write_transformers
from tests.tiny_models import tiny_model

PANEL = (250, 250, 250)


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Mamba-2 checkpoint with four heads a layer."""
    return write_transformers(tmp_path_factory.mktemp("mamba2") / "tiny", shards=2)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba-1 checkpoint in bf16, A_log included, with channels and states."""
    folder = tmp_path_factory.mktemp("mamba") / "tiny"
    tiny_model("mamba").bfloat16().save_pretrained(folder)
    return folder


def pixels(picture: Picture) -> np.ndarray:
    """RGB of the picture, refusing transparency, which would let a page's colour through."""
    image = Image.open(io.BytesIO(picture.png)).convert("RGBA")
    values = np.asarray(image)
    assert (values[..., 3] == 255).all()
    return values[..., :3]


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_pictures_of_heads(mamba2: Path, tmp_path: Path, granularity: Granularity) -> None:
    manifest = convert(str(mamba2), tmp_path / "out", granularity=granularity)
    pictures = draw_pictures(tmp_path / "out", manifest)
    assert [picture.path for picture in pictures] == [f"mmod/{name}.png" for name in ("perplexity", "factors")]
    for picture in pictures:
        shown = pixels(picture)
        assert shown.shape == (780, 1440, 3)
        # An own light panel with dark text on it reads alike on every page.
        assert tuple(shown[2, 2]) == tuple(shown[-3, -3]) == PANEL
        assert (shown.astype(int).sum(axis=-1) < 250).mean() > 0.003
    scales = ScaleSet.load(str(tmp_path / "out"))
    smallest = min(scales.factors(name).min() for name in scales.log_s)
    assert f"from {smallest:.3g} to" in pictures[1].alt and f"one per {granularity}" in pictures[1].alt
    assert "at 32k tokens 152.49 for the source and 41.97 for this model" in pictures[0].alt
    assert draw_pictures(tmp_path / "out", manifest) == pictures


@pytest.mark.parametrize("granularity", ["channel", "state", "element"])
def test_pictures_of_channels_and_states(mamba: Path, tmp_path: Path, granularity: Granularity) -> None:
    manifest = convert(str(mamba), tmp_path / "out", granularity=granularity)
    _, factors = draw_pictures(tmp_path / "out", manifest)
    assert "2 layers" in factors.alt and pixels(factors).std() > 5


def test_perplexity_at_one_length_or_without_a_value(mamba2: Path, tmp_path: Path) -> None:
    manifest = convert(str(mamba2), tmp_path / "out")
    for base in ({"256": 40.0}, {"256": 40.0, "8192": float("inf")}, {"256": float("nan")}):
        table = dataclasses.replace(PERPLEXITY, base=base, converted=dict.fromkeys(base, 40.0))
        [picture, *_] = draw_pictures(tmp_path / "out", dataclasses.replace(manifest, perplexity=table))
        assert pixels(picture).std() > 5


def test_sliding_window_is_a_line_of_its_own(mamba2: Path, tmp_path: Path) -> None:
    manifest = convert(str(mamba2), tmp_path / "out", calibration=None)
    table = dataclasses.replace(PERPLEXITY, sliding=100.0, sliding_window=512)
    without, shown = (
        draw_pictures(tmp_path / "out", dataclasses.replace(manifest, perplexity=t))[0] for t in (PERPLEXITY, table)
    )
    assert shown.alt.endswith("; 100.00 for the source on a sliding window.") and "sliding" not in without.alt
    # 100 lies between the curves, so that all else stays where it was.
    differs = (pixels(shown) != pixels(without)).any(axis=-1)
    assert differs.sum(axis=1).max() > 500


def test_steep_perplexity_has_a_logarithmic_axis(mamba2: Path, tmp_path: Path) -> None:
    """Where the source explodes, the converted model's curve must not be pressed flat onto the axis."""
    manifest = convert(str(mamba2), tmp_path / "out", calibration=None)
    base = {"256": 10.0, "1024": 100.0, "4096": 1000.0, "16384": 10000.0}
    table = dataclasses.replace(PERPLEXITY, base=base, converted={length: 10.0 for length in base})
    [picture, *_] = draw_pictures(tmp_path / "out", dataclasses.replace(manifest, perplexity=table))
    orange = (np.abs(pixels(picture).astype(int) - (180, 83, 9)).sum(axis=-1) < 30).nonzero()
    quarter = np.median(orange[0][np.abs(orange[1] - np.quantile(orange[1], 1 / 3)) < 20])
    height = orange[0].max() - orange[0].min()
    # On a linear axis a third of the way along the curve would still lie on the ground.
    assert orange[0].max() - quarter > 0.2 * height


def test_memory_is_drawn_by_length_and_distance(mamba2: Path, tmp_path: Path) -> None:
    """One panel each for the source, the sliding window and this model; darker where more is found."""
    manifest = dataclasses.replace(convert(str(mamba2), tmp_path / "out"), memory=MEMORY)
    picture = draw_pictures(tmp_path / "out", manifest)[0]
    assert picture.path == "mmod/memory.png"
    assert "(pass key) by length and distance; in 8192 tokens: 32 tokens back 50%" in picture.alt
    assert "192 tokens back 25% by the source, 0% by a sliding window and 94% by this model" in picture.alt
    assert "random span" not in picture.alt and "4k tokens back 0%" in picture.alt

    def darkness(cells: list[MemoryCell]) -> list[float]:
        """Blue in each third of the picture."""
        memory = dataclasses.replace(MEMORY, cells=cells)
        shown = pixels(draw_pictures(tmp_path / "out", dataclasses.replace(manifest, memory=memory))[0])
        blue = shown[..., 2].astype(int) - shown[..., 0] > 60
        return [float(part.mean()) for part in np.array_split(blue, 3, axis=1)]

    cell = MEMORY.cells[1]
    for place, field in enumerate(("base", "sliding", "converted")):
        nothing = dataclasses.replace(cell, base=0.0, sliding=0.0, converted=0.0)
        found = darkness([dataclasses.replace(nothing, **{field: 1.0})])
        assert found[place] > 0.2 and sum(found) - found[place] < 0.1
    asked_everywhere = darkness([dataclasses.replace(cell, distance=d, converted=1.0) for d in (32, 192)])
    asked_at_one = darkness(
        [
            dataclasses.replace(cell, length=8192, distance=32, converted=1.0),
            dataclasses.replace(cell, length=256, distance=192, converted=1.0),
        ]
    )
    assert asked_at_one[2] < 0.7 * asked_everywhere[2]


@pytest.mark.parametrize("memory", [None, dataclasses.replace(MEMORY, cells=[])])
def test_memory_without_an_answer_has_no_picture(mamba2: Path, tmp_path: Path, memory: MemoryTable | None) -> None:
    manifest = dataclasses.replace(convert(str(mamba2), tmp_path / "out"), memory=memory)
    assert "mmod/memory.png" not in [picture.path for picture in draw_pictures(tmp_path / "out", manifest)]


def test_folder_without_factors_has_no_pictures_of_them(mamba2: Path, tmp_path: Path) -> None:
    manifest = convert(str(mamba2), tmp_path / "out")
    (tmp_path / "out" / SCALES_NAME).unlink()
    assert [picture.path for picture in draw_pictures(tmp_path / "out", manifest)] == ["mmod/perplexity.png"]


def test_pictures_of_a_hybrid(tmp_path: Path) -> None:
    tiny_model("jamba").save_pretrained(tmp_path / "jamba")
    manifest = convert(str(tmp_path / "jamba"), tmp_path / "out")
    assert len(draw_pictures(tmp_path / "out", manifest)) == 2
