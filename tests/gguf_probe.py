"""Write the greedy text of a GGUF file, by llama.cpp: python gguf_probe.py FILE PROMPT_IDS_AS_JSON."""

from __future__ import annotations

import json
import sys

from llama_cpp import Llama

if __name__ == "__main__":
    model = Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False)
    text, prompt_ids = sys.argv[2], json.loads(sys.argv[3])
    answer = []
    for token in model.generate(prompt_ids, top_k=1, temp=0.0, repeat_penalty=1.0):
        if len(answer) == 12:
            break
        answer.append(token)
        if token == model.token_eos():
            break
    print(json.dumps({"ids": model.tokenize(text.encode(), add_bos=False, special=True), "answer_ids": answer}))
