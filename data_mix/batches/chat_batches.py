"""The batches of `make um3-instruct`: conversations about coded images, beside the mix of UM3's training.

    conversations  --key of their image-->  code shards  -->  `um3.model.sequences.conversation_sequence`

A batch stays a function of (seed, step), and its counts stay exact: `chat_share` of its samples are conversations. They
are evenly spread over it, so every rank has its share of both.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from torch import Tensor

from data_mix.batches.config import ChatDataConfig
from data_mix.batches.mix import NUM_SPECIAL_TOKENS, SequenceBatch, SequenceBatches
from data_mix.codes.shards import CodeShards, open_code_sources
from data_mix.conversations import MAX_UNUSABLE, ConversationSource, open_conversations
from data_mix.order import SampleOrder, fixed_counts, interleave, of_class, rank_positions
from data_mix.samples import BadSample, Split
from data_mix.sources.bad_files import BadFiles
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.model.sequences import TrainingSequence, conversation_sequence
from um3.model.text_tokenizer import encode_turns

if TYPE_CHECKING:
    from data_mix.sources.config import ConversationSourceConfig

logger = logging.getLogger(__name__)
SCENE_KEY = re.compile(r"scenes-(?:train|val)-(\d+)-\d+")
"""Key of a scene, with its seed."""
CHAT = "chat"


class CodedConversations:
    """The usable conversations of one source, by index, with the codes of their images."""

    def __init__(self, source: ConversationSource, indices: np.ndarray, coded: Mapping[str, tuple[CodeShards, int]]):
        """indices: those of the usable conversations in the source; coded: shards and index there of each image."""
        self.source, self.indices, self.coded = source, indices, coded

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Sequence[tuple[str, str]], Tensor | None]:
        """(turns, codes_N or None); BadSample if a file cannot be read."""
        conversation = self.source[int(self.indices[index])]
        if conversation.image is None:
            return conversation.turns, None
        shards, place = self.coded[conversation.image]
        return conversation.turns, shards[place].codes_N


def join_codes(
    configs: Sequence["ConversationSourceConfig"], *, codes: str, fingerprint: str | None, split: Split = "train"
) -> dict[str, CodedConversations]:
    """The conversations of each source, joined to the code shards of both splits in the folder `codes`.

    UserError if more than 1 % of a source's conversations cannot be used; fewer are counted in a warning.
    """
    is_drawn = any(config.kind != "llava" for config in configs)  # for images of one size
    shards = open_shards(codes, fingerprint=fingerprint) if is_drawn else []
    size: dict[str, Any] = {"image_size": shards[0].image_size, "seed": _scenes_seed(shards)} if shards else {}
    sources = {config.name: open_conversations(config, split=split, **size) for config in configs}
    images: dict[str, dict[int, str | None]] = {}
    problems = {name: BadFiles(name) for name in sources}
    for name, source in sources.items():
        images[name] = {}
        for index in range(len(source)):
            try:
                images[name][index] = source[index].image
            except BadSample as error:
                problems[name].count(error.reason, str(error))
    wanted = {image for of_source in images.values() for image in of_source.values() if image is not None}
    coded = _find_codes(wanted, shards or open_shards(codes, fingerprint=fingerprint)) if wanted else {}
    joined = {}
    for config in configs:
        problem, of_source = problems[config.name], images[config.name]
        for index, image in list(of_source.items()):
            if image is not None and image not in coded:
                problem.count(f"image without codes in {codes}", image)
                del of_source[index]
        total = len(sources[config.name])
        if total - len(of_source) > MAX_UNUSABLE * total:
            encoded = f"{{name: ..., path: {config.images or 'their folder'}, has_captions: false, val_fraction: 0}}"
            raise UserError(
                f"source '{config.name}': only {len(of_source):,} of {total:,} conversations can be used; "
                f"{problem.summary()}. To encode their images, add {encoded} to codes.images and run make codes"
            )
        problem.report(len(of_source))
        joined[config.name] = CodedConversations(sources[config.name], np.array([*of_source]), coded)
    return joined


def open_shards(folder: str, *, fingerprint: str | None) -> list[CodeShards]:
    """The coded images of all sources and of every split that has shards."""
    splits = [split for split in get_args(Split) if any(Path(folder).glob(f"{split}-*.arrow"))] or ["train"]
    opened = [open_code_sources(folder, split=split, expected_fingerprint=fingerprint) for split in splits]
    return [shards for sources in opened for shards in sources.values()]


def _scenes_seed(sources: Iterable[CodeShards]) -> int:
    """The seed of the scenes whose codes are there, 0 without any."""
    first_keys = (next((key for _, key in shards.each_key()), "") for shards in sources)
    return next((int(found[1]) for key in first_keys if (found := SCENE_KEY.fullmatch(key))), 0)


def _find_codes(keys: set[str], sources: Iterable[CodeShards]) -> dict[str, tuple[CodeShards, int]]:
    found: dict[str, tuple[CodeShards, int]] = {}
    for shards in sources:
        for index, key in shards.each_key():
            if key in keys and found.setdefault(key, (shards, index)) != (shards, index):
                names = f"'{found[key][0].name}' and '{shards.name}'"
                raise UserError(f"the image {key} has codes in the sources {names}; rename it in one of them")
    return found


class ChatBatches(SequenceBatches):
    """`SequenceBatches` of which `chat_share` are conversations, with keys "chat/SOURCE"."""

    def __init__(
        self, config: ChatDataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1, **options: Any
    ) -> None:
        """As `SequenceBatches`; UserError also for conversations that cannot be used (`join_codes`)."""
        num_chats = round(config.chat_share * batch_size)
        if not 0 < num_chats < batch_size:
            raise UserError(
                f"data.chat_share={config.chat_share} of {batch_size} samples is {num_chats} conversations; make it "
                "leave one conversation and one other sample at least"
            )
        super().__init__(config, batch_size=batch_size - num_chats, **options)
        kinds = interleave([batch_size - num_chats, num_chats])
        mine = rank_positions(batch_size, rank=rank, world_size=world_size)
        self.positions, self.chat_positions = (of_class(kind, kinds, mine) for kind in (0, 1))
        sources = config.conversations
        self.chats = join_codes(sources, codes=config.codes, fingerprint=options.get("fingerprint"))
        self.chat_keys = [f"{CHAT}/{source.name}" for source in sources]
        weights, names = [source.weight for source in sources], f"conversations {[*self.chats]}"
        self.counts[CHAT] = fixed_counts(weights, batch_size=num_chats, of=names)
        for key, chats in zip(self.chat_keys, self.chats.values(), strict=True):
            self.orders[key] = SampleOrder(len(chats), seed=self.seed, name=key)
        self.keys += self.chat_keys
        least = self.ids.image_tokens + NUM_SPECIAL_TOKENS + 1
        if config.seq_len < least:
            raise UserError(
                f"data.seq_len={config.seq_len} cannot hold an image and an answer; set it to {least} or more"
            )

    def batch(self, step: int) -> SequenceBatch:
        """This rank's part of the batch of `step`; conversations come after the samples of the mix."""
        draws = self.counts[CHAT].draws(step, self.chat_positions)
        plan = [(self.chat_keys[number], draw) for number, draw in draws]
        mine = [self._conversation(key, draw) for key, draw in plan]
        batch = self._batch(step, others=[sample for sample, _, _ in mine])
        for (sample, is_replaced, _), (key, _) in zip(mine, plan, strict=True):
            batch.seen_KC[self.keys.index(key)] += self._counted(sample, is_replaced=is_replaced)
        return batch._replace(
            sources=[*batch.sources, *(key.removeprefix(f"{CHAT}/") for key, _ in plan)],
            truncated_captions=batch.truncated_captions + sum(is_cut for _, _, is_cut in mine),
        )

    def scheduled(self, step: int) -> dict[str, float]:
        due = self.counts[CHAT].due(step)
        return super().scheduled(step) | {CHAT: sum(due)} | dict(zip(self.chat_keys, due, strict=True))

    def fingerprints(self) -> dict[str, str]:
        chats = {f"{CHAT}/{name}": chats.source.fingerprint() for name, chats in self.chats.items()}
        shards = {shards.digest for chats in self.chats.values() for shards, _ in chats.coded.values()}
        return super().fingerprints() | chats | {f"{CHAT} codes": short_hash(sorted(shards))}

    def _conversation(self, key: str, draw: int) -> tuple[TrainingSequence, bool, bool]:
        """(sequence, is another one than planned, is cut) of a draw of a source.

        A conversation that cannot be read, or whose first answer begins after `seq_len`, is replaced by the next one.
        """
        chats, seq_len = self.chats[key.removeprefix(f"{CHAT}/")], self.config.seq_len
        for tries, index in enumerate(self.orders[key].substitutes(draw)):
            try:
                turns, codes_N = chats[index]
            except BadSample:
                continue
            visual_P = None if codes_N is None else self.ids.codes_to_ids(codes_N)
            whole = conversation_sequence(encode_turns(turns, tokenizer=self.text_tokenizer), visual_P, ids=self.ids)
            cut = TrainingSequence(*(tensor_T[:seq_len] for tensor_T in whole))
            if cut.targets.any():
                return cut, tries > 0, len(whole.input_ids) > seq_len
        raise UserError(f"{key}: no conversation can be read and has an answer within data.seq_len={seq_len}; raise it")
