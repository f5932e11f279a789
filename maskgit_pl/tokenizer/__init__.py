"""Stage 1: the tokenizer, and its losses."""
