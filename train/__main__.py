"""`python -m train COMMAND ...`: train a phase, make the model that UM3 starts from, or plan a run.

`torchrun`, `deepspeed`, `accelerate` and the Slurm script start the phases with the same arguments.
"""

import sys

from um3.core.commands import Command, run_room
from um3.core.distributed import leave_group

COMMANDS = {
    "stage1": Command("train.phase", "train the visual tokenizer: reconstruction and text alignment", named=True),
    "stage2": Command("train.phase", "fine-tune its decoder: perceptual and adversarial losses", named=True),
    "um3": Command("train.phase", "train the unified model on the scheduled mix", named=True),
    "um3-instruct": Command("train.phase", "train the unified model on conversations", named=True),
    "llava-align": Command("train.phase", "train the projector of a LLaVA on a QLIP", named=True),
    "llava-instruct": Command("train.phase", "train its projector and language model on conversations", named=True),
    "um3-init": Command("train.phase", "make a starting UM3 from a Llama or Qwen and a QLIP", named=True),
    "llamagen": Command("train.phase", "train LlamaGen, text-to-image on the codes", named=True),
    "text-features": Command("train.text_features", "encode the captions of the codes for llamagen"),
    "check": Command("train.check", "verify the code shards, caches and checkpoints of a run"),
    "settings": Command("train.settings_check", "which phases of make demo have these settings, and what is wrong"),
    "own-images": Command("train.plan.own_images", "choose the settings for your own images, by a time budget"),
    "plan": Command("train.plan.plan", "what fits which GPUs, and how long training takes"),
}

if __name__ == "__main__":
    # DeepSpeed's launcher adds it in front; LOCAL_RANK in the environment says the same.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    run_room("train", COMMANDS)
    leave_group()
