"""Evaluation: language, captions, generation, tokenizer quality, published benchmarks, and the report.

It does not depend on optimizers. Every result is a `eval.scores.Score`: the value, the number of samples, the protocol,
the commit, and the paper's value.
"""
