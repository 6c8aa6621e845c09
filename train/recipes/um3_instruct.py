"""UM3 learns to answer: training goes on from a UM3 folder, on conversations and the mix of UM3's training.

The loop, loss, engine and files are those of `train.recipes.um3`; only the batches differ
(`data_mix.batches.chat_batches`).
"""

from data_mix.batches.chat_batches import CHAT, ChatBatches
from data_mix.batches.mix import SequenceBatch
from data_mix.conversations import MAX_UNUSABLE, MIN_COUNTED
from train.recipes.um3 import UM3Task
from train.settings.um3 import UM3Config, UM3InstructConfig, VocabularyConfig
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.hub import model_folder
from um3.model.configuration import ModelConfig
from um3.model.language_model import QLIP_FOLDER, stored_texts
from um3.model.vocabulary import UnifiedVocabulary


class UM3InstructTask(UM3Task):
    """`UM3Task` on `ChatBatches`; the model's config.json and card name the conversations."""

    batches_of = ChatBatches

    def __init__(self, config: UM3InstructConfig):
        super().__init__(um3_config(config))
        if config.data.packing == "documents" and self.ids.bos_id == self.ids.eos_id:
            raise UserError(
                f"{config.init_from} begins documents with the token that ends its answers, so packed conversations "
                "would fall apart; set data.packing=none"
            )
        known = stored_texts(self.model.config.um3, key="conversations")
        names = [*known, *(source.name for source in config.data.conversations)]
        self.model.config.um3 |= {"conversations": list(dict.fromkeys(names))}

    def _mix_metrics(self, batch: SequenceBatch, *, step: int) -> dict[str, float]:
        values = super()._mix_metrics(batch, step=step)
        counts = [of_key for key, of_key in self.account.state().items() if key.startswith(f"{CHAT}/")]
        seen, replaced = (sum(of_key[name] for of_key in counts) for name in ("samples", "replaced"))
        if seen >= MIN_COUNTED and replaced > MAX_UNUSABLE * seen:
            raise UserError(
                f"{replaced:,} of {seen:,} conversations were replaced: their image's codes cannot be read, or their "
                f"first answer begins after data.seq_len={self.config.data.seq_len}; raise it, or run make check"
            )
        return values


def um3_config(config: UM3InstructConfig) -> UM3Config:
    """The config of `UM3Task` for a UM3 that `config.init_from` describes."""
    folder = model_folder(config.init_from, kind="UM3 model")
    stored = read_json(folder / "config.json")
    ids = UnifiedVocabulary.from_dict(stored.get("um3"), where=folder / "config.json")
    shared = {name: section for name, section in vars(config).items() if name != "init_from"}
    return UM3Config(
        **shared,
        model=ModelConfig(base_model=str(folder), qk_norm=stored.get("model_type") == "qwen3"),
        vocabulary=VocabularyConfig(
            subtokens=ids.subtokens,
            bits_per_subtoken=ids.bits_per_subtoken,
            prediction="depth" if ids.depth_layers else "flat",
            depth_layers=ids.depth_layers or 1,
        ),
        visual_tokenizer=str(folder / QLIP_FOLDER),
    )


build_task = UM3InstructTask
