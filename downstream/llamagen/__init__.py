"""LlamaGen: text-to-image with an autoregressive transformer on image codes."""
