"""Compute logits and ids of a folder with transformers, for tests that use another Python.

    python transformers_gpt2.py JOBS.json

A job is {"folder", "ids" (an .npy, int [B, T]), "logits" (an .npy to write)}; with "config" too
the folder is first made, with random weights of that GPT2Config. With "text", the job's ids by the
folder's tokenizer are written to "tokens" (a JSON file).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel


def run(job: dict) -> None:
    if "config" in job:
        torch.manual_seed(0)
        made = GPT2LMHeadModel(GPT2Config(**job["config"]))
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn_like(p))
        made.save_pretrained(job["folder"])
    model, found = GPT2LMHeadModel.from_pretrained(job["folder"], output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(job["ids"]))).logits
    np.save(job["logits"], logits.numpy())
    if "text" in job:
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        Path(job["tokens"]).write_text(json.dumps(tokenizer(job["text"])["input_ids"]))


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
