"""`python -m downstream COMMAND ...`: convert models of the paper's drop-in systems."""

from um3.core.commands import Command, run_room

COMMANDS = {
    "llamagen-import": Command("downstream.llamagen.convert", "make a folder of a released LlamaGen file", named=True),
    "llamagen-export": Command("downstream.llamagen.convert", "write a folder as a released file", named=True),
}

if __name__ == "__main__":
    run_room("downstream", COMMANDS)
