# %% [markdown]
# # Convert a model, and load it with stock transformers
# Finds scales, writes them into a copy of the checkpoint, proves the copy and generates with it. The bundled model
# takes about a minute on a CPU. Open this file as a notebook in VS Code or Jupyter (with jupytext), or run it.

# %%
MODEL = "demo"  # or a Hub id, or a folder
OUTPUT = "demo-scaled"
DATA = ()  # your texts; a bundled novel for the demo
TRAIN_LEN = None  # None: known for many families, measured for others
TARGET_LEN = 8192

# %% [markdown]
# `floor` needs hardly any text and no training, so that this example is quick. Leave `method` out for the default,
# `gradient`, which keeps what the model recalls.

# %%
from calibrator import calibrate
from converter import bake, verify

scales = calibrate(MODEL, data=DATA, train_len=TRAIN_LEN, target_len=TARGET_LEN, method="floor")
report = bake(MODEL, OUTPUT, scales, overwrite=True)
print(len(report.changed), "tensors scaled,", report.identical, "copied byte for byte")

# %%
proof = verify(OUTPUT, base=MODEL)
print(proof.changed, "equal the formula,", proof.identical, "the base")

# %% [markdown]
# From here on nothing knows of this project: the copy is a model like any other.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(OUTPUT)
tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
prompt = tokenizer("She had been forced into prudence in her youth,", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))
