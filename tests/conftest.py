"""What all tests need: a SIGINT that is heard."""

import signal

# A shell starts background jobs (`make test &`) with SIGINT ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
