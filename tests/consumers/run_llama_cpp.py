"""Converts a folder to GGUF with llama.cpp's own converter.

    python -m tests.consumers.run_llama_cpp FOLDER OUTPUT

The converter knows tokenizers by a fingerprint. The bundled demo's is its own, so it is named for it here; those of
published checkpoints are among the ones it knows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.consumers.fetch import FOLDER


def main() -> None:
    """Write one GGUF file in float32."""
    folder, output = map(Path, sys.argv[1:])
    sys.path.insert(0, str(FOLDER / "llama_cpp"))
    import gguf
    from conversion import ModelBase, get_model_class

    hparams = ModelBase.load_hparams(folder, False)
    model_class = get_model_class(hparams["architectures"][0], False)
    model_class.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    model_class.set_vocab = lambda self: self._set_vocab_gpt2()
    # The tiny models have no layers that predict several tokens.
    model_class.no_mtp = True
    model_class(folder, gguf.LlamaFileType.ALL_F32, output, hparams=hparams).write()


if __name__ == "__main__":
    main()
