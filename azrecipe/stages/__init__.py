"""The four jobs: tokenizer, pretrain, sft, evaluate; each reads top to bottom."""
