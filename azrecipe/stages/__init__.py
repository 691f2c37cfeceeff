"""The five jobs: tokenizer, pretrain, sft, merge, evaluate; each reads top to bottom."""
