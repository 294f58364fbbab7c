# %% [markdown]
# # Apply scales in memory, and look at what changes
# `ScaleSet.applied_to` scales a loaded model while a block runs and undoes it afterwards.

# %%
from pathlib import Path

import converter

MODEL = "demo"  # or a Hub id, or a folder
TEXT = Path(converter.__file__).parent / "demo" / "texts" / "northanger-abbey.txt"
DATA = ()  # texts to calibrate on; a bundled novel for the demo
TRAIN_LEN = None  # None: known for many families, measured for others
TARGET_LEN = 8192

# %%
from calibrator import calibrate
from converter import ScaleSet, bake

scales = calibrate(MODEL, data=DATA, train_len=TRAIN_LEN, target_len=TARGET_LEN, method="floor")

# %% [markdown]
# The bundled checkpoint is in the state-spaces layout. Scales of 1 give a copy that stock transformers loads; skip
# this for a model in the transformers layout.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

shapes = {tensor.name: tensor.shape for tensor in converter.inspect(MODEL).A_log}
bake(MODEL, "demo-unscaled", ScaleSet.ones(shapes, scales.granularity, scales.form), overwrite=True)
model = AutoModelForCausalLM.from_pretrained("demo-unscaled", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("demo-unscaled")

# %% [markdown]
# The loss of each token of one long window, as trained, scaled and undone.

# %%
import torch

tokens = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :TARGET_LEN]


@torch.no_grad()
def losses():
    logits = model(tokens).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")


before = losses()
with scales.applied_to(model):
    scaled = losses()
undone = losses()
assert torch.equal(before, undone)

# %%
start, length = 0, TARGET_LEN // 8
while start < len(before):
    part = slice(start, start + length)
    perplexities = [float(values[part].mean().exp()) for values in (before, scaled)]
    print(f"tokens {start} to {start + length}: perplexity {perplexities[0]:.2f}, scaled {perplexities[1]:.2f}")
    start, length = start + length, max(length, start + length)

# %% [markdown]
# An eigenvalue forgets over 1 / (|A| Δ) tokens; a factor s divides that by s.

# %%
for name, log_s in scales.log_s.items():
    print(
        f"{name}: {int((log_s != 0).sum())} of {log_s.size} factors changed, log s up to {float(log_s.max()):.2f}"
    )
