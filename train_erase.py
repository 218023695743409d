"""Erase a concept: `accelerate launch train_erase.py --config C --output_dir D`."""

import sys

from expunge.cli import run
from expunge.train.train_erase import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
