"""`python -m train settings`: what `make demo` refuses before it trains."""

import re

import pytest

from train.settings_check import main
from um3.core.errors import UserError


def test_it_says_which_phases_a_setting_is_for(capsys):
    main(["--config", "demo", "loop.max_steps=60", "model.bits=8", "um3.loop.max_steps=90", "num_threads=1"])
    assert capsys.readouterr().out.splitlines() == [
        "setting loop.max_steps, for stage1, stage2, um3",
        "setting model.bits, for stage1",
        "setting um3.loop.max_steps, for um3",
        "setting num_threads, for codes, eval",
    ]


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("loop.total_steps=60", "'loop.total_steps'; its new name is 'max_steps'"),
        ("lop.max_steps=60", "'lop'; did you mean 'loop'"),
        ("um3.loop.max_stps=60", "'loop.max_stps'; did you mean 'loop.max_steps'"),
        ("optimizer.lr.x=60", "'optimizer.lr.x'; 'optimizer.lr' is one value"),
        ("um3.loop.max_steps=0", "loop.max_steps is 0"),
        ("data.texts=[{name: text, path: /nope}]", "/nope"),
        ("images=[{name: data, path: /nope}]", "/nope"),
    ],
)
def test_a_mistake_in_any_phase_is_refused(setting, names):
    with pytest.raises(UserError, match=re.escape(names)):
        main(["--config", "demo", setting])
