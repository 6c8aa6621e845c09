"""The real language model that `make smollm2` writes: query-key normalisation costs it less than 0.05 nats a token."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from data_mix.demo.python_docs import python_documents
from tests.helpers.processes import ROOT
from um3.model.extend import load_base
from um3.model.qk_norm import fit_qk_norm, insert_qk_norm

FOLDER = ROOT / "models/smollm2"
LENGTH = 512


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.exists(), reason="make smollm2 writes it")
@torch.no_grad()
def test_inserted_normalisation_costs_little():
    base, tokenizer = load_base(str(FOLDER)), AutoTokenizer.from_pretrained(FOLDER)
    prose = "\n".join(text for _, text in python_documents()[::20])
    ids_XT = torch.tensor(tokenizer(prose)["input_ids"][: 14 * LENGTH]).view(14, LENGTH)

    def loss(model):
        logits_XV = torch.cat([model(ids_T[None]).logits[0, :-1] for ids_T in ids_XT[10:]])
        return F.cross_entropy(logits_XV, ids_XT[10:, 1:].flatten())

    before = loss(base)
    assert 2 < before < 4
    model = insert_qk_norm(base, fit_qk_norm(base, calibration=ids_XT[:10, None]))
    assert loss(model) - before < 0.05
    assert loss(insert_qk_norm(base)) - before > 1  # gains of 1
