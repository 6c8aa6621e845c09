"""The linear probe: the paper's recipe and logistic regression, on data whose answer is known."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import tokenizer
from eval.config import ProbeConfig
from eval.scores import Measurement
from eval.tasks.classification_data import ClassificationData, ClassificationTask
from eval.tasks.linear_probe import fit_adamw, fit_logistic, lr_share, probe_data, probe_scores

T = Measurement("t", 0)


def separable(*, count=600, classes=4, width=12, seed=0):
    """Inputs (N, S) far from standard scale with a class each, and labels (N,)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    inputs = generator.normal(size=(count, width)) * 3 + 5 + np.eye(width)[labels] * 12
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)


def adamw(data, *, classes=4, seed=0, **settings):
    return fit_adamw(data[0], labels_N=data[1], num_classes=classes, config=ProbeConfig(**settings), seed=seed)


def test_logistic_agrees_with_sklearn():
    inputs, labels = separable(count=300)
    inputs = inputs.double()
    mean, spread = inputs[:200].mean(0), inputs[:200].std(0)
    expected = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit((inputs[:200] - mean) / spread, labels[:200])
    probe = fit_logistic(inputs[:200], labels_N=labels[:200], num_classes=4)
    np.testing.assert_allclose(probe.weight.numpy(), expected.coef_, atol=1e-3)
    assert (probe.predict(inputs[200:]).numpy() == expected.predict((inputs[200:] - mean) / spread)).all()


def test_a_constant_feature_is_harmless():
    inputs, labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.9]]), torch.tensor([0, 1, 0, 1])
    probes = [fit_logistic(inputs, labels_N=labels, num_classes=2), adamw((inputs, labels), classes=2)]
    assert [probe.predict(inputs).tolist() for probe in probes] == [[0, 1, 0, 1]] * 2


def test_the_papers_recipe_is_about_as_accurate_as_logistic_regression():
    inputs, labels = separable()
    train, val = slice(0, 400), slice(400, None)
    recipe = adamw((inputs[train], labels[train]), batch_size=64).predict(inputs[val])
    logistic = fit_logistic(inputs[train], labels_N=labels[train], num_classes=4).predict(inputs[val])
    accuracies = [float((predicted == labels[val]).float().mean()) for predicted in (recipe, logistic)]
    assert accuracies[1] > 0.95 and abs(accuracies[0] - accuracies[1]) < 0.03


def test_only_the_order_of_batches_is_random_and_it_is_seeded():
    fit = [adamw(separable(count=100), seed=seed, batch_size=16, epochs=3) for seed in (0, 0, 1)]
    assert torch.equal(fit[0].weight, fit[1].weight) and torch.equal(fit[0].bias, fit[1].bias)
    assert not torch.equal(fit[0].weight, fit[2].weight)


def test_the_first_step_of_adamw_by_hand():
    """From zero weights Adam moves each weight by the learning rate against its gradient's sign."""
    inputs, labels = separable(count=50)
    probe = adamw((inputs, labels), lr=0.125, epochs=1, warmup_epochs=0, batch_size=50)
    standard = (inputs - inputs.mean(0)) / inputs.std(0)
    gradient = (torch.full((50, 4), 0.25) - torch.eye(4)[labels]).T @ standard
    torch.testing.assert_close(probe.weight, -0.125 * gradient.sign(), rtol=1e-3, atol=1e-4)


def test_the_learning_rate_rises_linearly_and_falls_on_a_cosine():
    shares = [lr_share(step, warmup=4, total=12) for step in range(12)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[8] == pytest.approx(0.5) and shares[11] == pytest.approx((1 - np.cos(np.pi / 8)) / 2)
    assert lr_share(0, warmup=0, total=3) == 1.0


@pytest.fixture(scope="module")
def towers(qlip_folder):
    model, processor = tokenizer.load(qlip_folder)
    return {"model": model, "processor": processor}


@pytest.fixture(scope="module")
def dark(scenes):
    """The scenes in two classes, dark and light, which even a random tower separates."""
    return dark_or_light(scenes[0])


def dark_or_light(images, *, identity="dark or light"):
    brightness = images.mean((1, 2, 3))
    classes = (brightness < np.median(brightness)).astype(int).tolist()
    data = ClassificationData(images.__getitem__, classes=classes, identity=identity)
    return ClassificationTask("brightness", data, data, ["light", "dark"], ["a {} scene"])


def test_a_real_tokenizer_is_probed(towers, dark, scenes):
    images = scenes[0]
    hidden = towers["model"].vision_features(towers["processor"].pixels(images)).detach()
    expected = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(probe_data(dark.val, **towers).both_NS, expected, rtol=1e-4, atol=1e-5)
    for config in (ProbeConfig(), ProbeConfig(kind="logistic")):
        rows = probe_scores(dark, config=config, of=T, **towers)
        assert [row.metric for row in rows] == ["probe_cls", "probe_mean", "probe_cls_mean"]
        assert rows[1].value > 0.7 and rows[1].n == 40
    rows = probe_scores(dark._replace(train=None, note="no train"), config=ProbeConfig(), of=T, **towers)
    assert [(row.value, row.note) for row in rows] == [(None, "no train")] * 3


def test_the_settings_are_part_of_the_protocol(towers, dark, scenes):
    def row(config, task=dark):
        return probe_scores(task, config=config, of=T, **towers)[0]

    first = row(ProbeConfig())
    settings = {"lr": 0.2, "epochs": 10, "warmup_epochs": 1, "batch_size": 1024, "train_images": 40, "images": 40}
    assert settings.items() <= first.protocol.items()
    assert (first.protocol["augmentation"], first.protocol["data"]) == ("none", "dark or light")
    others = [ProbeConfig(lr=0.1), ProbeConfig(epochs=11), ProbeConfig(warmup_epochs=0), ProbeConfig(batch_size=8)]
    others.append(ProbeConfig(kind="logistic"))
    hashes = [row(config).protocol_hash for config in (ProbeConfig(), *others)]
    hashes.append(row(ProbeConfig(), dark_or_light(scenes[0], identity="other")).protocol_hash)
    assert hashes[0] == first.protocol_hash and len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("kind", ["adamw", "logistic"])
def test_a_diverged_probe_is_a_row_without_a_value(towers, dark, kind):
    rows = probe_scores(dark, config=ProbeConfig(lr=1e6), of=T, **towers)
    assert all(0 <= row.value <= 1 for row in rows), "even with a far too high rate"
    broken = copy.deepcopy(towers["model"])
    broken.vision_model.embeddings.class_embedding.data.fill_(torch.inf)
    rows = probe_scores(dark, config=ProbeConfig(kind=kind), of=T, model=broken, processor=towers["processor"])
    assert all(row.value is None and "tokenizer.probe.lr" in row.note for row in rows)
