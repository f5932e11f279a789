"""Checks, trains, evaluates and tunes a small run from Python: python from_python.py DATA.

DATA is a data folder, such as the one that ``make data`` writes. All output goes to the working folder.
"""

import logging
import sys
from pathlib import Path

from rich.console import Console

from maskgit_pl import MaskGIT, evaluation, runs

logging.basicConfig(level="INFO", format="%(message)s")
data = Path(sys.argv[1])
short = {"trainer.max_steps": 20, "trainer.val_check_interval": 20, "data.validation_samples": 24}

# Stage 1. ``preflight`` finds in seconds what would otherwise fail after an hour of training.
first = runs.Recipe.read("tokenizer", overrides=short)
print(runs.preflight(first, run="notebook", data=data))
tokenizer = runs.fit(first, run="notebook", data=data)
print(tokenizer.folder, tokenizer.step, tokenizer.metrics)

# Stage 2. The images are turned into tokens once; every run with this tokenizer uses them.
second = runs.Recipe.read("transformer", names="cosine", overrides=short)
runs.tokenize(second, run="notebook", data=data)
transformer = runs.fit(second, run="notebook", data=data)
print(transformer.folder, transformer.step, transformer.metrics)
assert runs.fit(second, run="notebook", data=data).was_finished

# Generate an image, measure the model, and search for better decoding settings for the same weights.
run = Path("runs/notebook")
pipe = MaskGIT.from_pretrained(transformer.pretrained)
pipe.generate(pipe.class_names[0], seed=0)[0].save("image.png")
evaluation.train_classifier(data)  # in whose features images are compared
how = evaluation.EvaluationOptions(data=data, num_images=30, features=["classifier"])
report = evaluation.evaluate(run, how)
Console().print(report.table())
found = evaluation.tune(run, evaluation.TuningOptions(data=data, trials=2, num_images=30))
print(found.winner)
