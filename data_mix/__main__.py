"""`python -m data_mix COMMAND ...`: encode images, draw the data mix, or write questions about scenes."""

from um3.core.commands import Command, run_room

COMMANDS = {
    "encode": Command("data_mix.codes.encode", "encode images to code shards"),
    "mix-preview": Command("data_mix.batches.mix_preview", "draw the data mix of a UM3 config"),
    "questions": Command("data_mix.write_questions", "write questions about scenes and digits as files"),
}

if __name__ == "__main__":
    run_room("data_mix", COMMANDS)
