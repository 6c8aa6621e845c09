"""Codes: images encoded by the visual tokenizer, stored in shards."""
