"""Published benchmarks of captions and generated images, as commands."""
