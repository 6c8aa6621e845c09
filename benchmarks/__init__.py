"""Speed and memory of the real thing, each measurement in a process of its own.

`make bench-tokenizer`: encode and decode beside a plain transcription of the released forward pass, told as a ratio.
`make bench-training`: time, memory and model FLOPs utilisation of a step of stage 1 and of stage 2.
`make bench-memory`: memory of a training step against the batch size (paper, Figure 3).
`make bench-loss`: a step of UM3 beside full-vocabulary logits and cross entropy, told as a ratio.

Figures with hardware and date are kept beside the scripts; no test asserts a time.
"""
