# %% [markdown]
# # Calibrate on your own text
# Calibrate on text like that which the model is to read: a file, a folder, JSONL or a Hub data set. The default
# method takes minutes for the bundled model on a CPU.

# %%
from pathlib import Path

import converter

TEXTS = Path(converter.__file__).parent / "demo" / "texts"
MODEL = "demo"  # or a Hub id, or a folder
OUTPUT = "demo-my-text"
DATA = (str(TEXTS / "persuasion.txt"),)  # your texts, each with =WEIGHT if you like
HELD_OUT = str(TEXTS / "northanger-abbey.txt")  # a text that the calibration does not see
TRAIN_LEN = None  # None: known for many families, measured for others
TARGET_LEN = 8192
STEPS = None  # the method's default

# %%
from calibrator import calibrate
from converter.commands.console import Console

scales = calibrate(MODEL, data=DATA, train_len=TRAIN_LEN, target_len=TARGET_LEN, steps=STEPS, reporter=Console())

# %%
from calibrator import evaluate
from converter import bake

bake(MODEL, OUTPUT, scales, overwrite=True)
lengths = (TARGET_LEN // 16, TARGET_LEN)
record = evaluate(MODEL, OUTPUT, text=(HELD_OUT,), lengths=lengths, windows=1)
for entry in record["models"]:
    print(entry["model"], entry["perplexity"])

# %% [markdown]
# Perplexity alone says nothing about memory. What is found of facts, by length and distance:

# %%
record = evaluate(
    MODEL,
    OUTPUT,
    task="recall",
    text=(HELD_OUT,),
    lengths=lengths,
    distances=(64,),
    samples=8,
    kind=("random span",),
)
for entry in record["models"]:
    for cell in entry["cells"]:
        print(entry["model"], cell)
