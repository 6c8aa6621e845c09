"""Questions about images: the published sets, their prompts and scoring rules, answer files and answering models."""
