"""Streams of random numbers: named, independent, and the same on every machine."""

import torch

from um3.core.seeds import derive_seed, numpy_generator, seed_everything, torch_generator


def test_seeds_never_change() -> None:
    """Another value here would make every run of a seed another run."""
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(17, "step", 3) == 4789921028265567934


def test_seeds_differ_by_seed_name_and_order() -> None:
    names: list[tuple[str | int, ...]] = [(), ("a",), ("a", 0), ("a", 1), (1, "a"), ("b",)]
    seeds = [derive_seed(seed, *name) for seed in (0, 1, -1) for name in names]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat_by_name_alone() -> None:
    torch.manual_seed(5)
    first = torch.rand(3, generator=torch_generator(1, "noise"))
    torch.manual_seed(6)
    assert torch.equal(first, torch.rand(3, generator=torch_generator(1, "noise")))
    assert not torch.equal(first, torch.rand(3, generator=torch_generator(1, "other")))
    assert numpy_generator(1, "noise").random() == numpy_generator(1, "noise").random()
    assert numpy_generator(1, "noise").random() != numpy_generator(2, "noise").random()


def test_torchs_own_generator_is_set_by_name() -> None:
    seed_everything(3, "weights")
    first = torch.rand(3)
    seed_everything(3, "step", 1)
    second = torch.rand(3)
    seed_everything(3, "weights")
    assert torch.equal(first, torch.rand(3)) and not torch.equal(first, second)
