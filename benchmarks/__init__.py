"""Speed and memory against what a user would run instead, always side by side in one run and told as a ratio.

`make bench-tokenizer`. Figures with hardware and date are kept beside the scripts; no test asserts a time.
"""
