"""LLaVA-1.5 on QLIP: a frozen visual encoder, a projector and a language model, as stock transformers classes."""
