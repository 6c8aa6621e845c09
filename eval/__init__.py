"""Evaluation: language, captions, generation, tokenizer quality, and the report against the paper.

Knows nothing of optimizers. A number that leaves this room is a `Score`: a row that says what was measured, on how
many samples, under which protocol, by which commit, and what the paper has in its place.
"""
