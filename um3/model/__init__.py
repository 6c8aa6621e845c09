"""The language model: its vocabulary, sequences, weights, loss, and the ways from a Llama to a UM3 and back."""
