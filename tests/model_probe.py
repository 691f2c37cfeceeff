"""Write what a model folder gives: token ids, texts and logits; run by interpreters with other versions of transformers.

python model_probe.py OUTPUT FOLDER...: writes OUTPUT as JSON, folder by folder. It imports nothing of azrecipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Kənddə bir qoca yaşayırdı. O, hər səhər bağa gedər, ağaclara su verərdi. The fox had 12 stones."
MESSAGES = [{"role": "user", "content": "Bu neçədir: 2 + 2?"}]


def probe(folder: str) -> dict[str, Any]:
    """Open a folder and run its model once."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    ids = tokenizer(TEXT).input_ids
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) if tokenizer.chat_template else TEXT
    prompt_ids = tokenizer(prompt, add_special_tokens=prompt is TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        answer = model.generate(prompt_ids, max_new_tokens=12, do_sample=False)[0, prompt_ids.shape[1] :]
    return {
        "ids": ids,
        "bos": tokenizer.bos_token_id,
        "prompt": prompt,
        "prompt_ids": prompt_ids[0].tolist(),
        "special": sorted(tokenizer.all_special_tokens),
        "logits": logits.tolist(),
        "answer_ids": answer.tolist(),
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
        "dtype": str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype),
    }


if __name__ == "__main__":
    output, *folders = sys.argv[1:]
    Path(output).write_text(json.dumps({folder: probe(folder) for folder in folders}), encoding="utf-8")
