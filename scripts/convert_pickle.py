"""A published pickle of tensors as safetensors: Q16's prompts.p, heads on CLIP.

    python scripts/convert_pickle.py prompts.p q16_prompts.safetensors

Nothing in the pickle is run. The shapes are printed; what wrote the file stays yours to trust.
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from expunge.errors import UserError
from expunge.eval.detectors.pickled import read_pickled
from expunge.results import sha256_file


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    try:
        tensors = read_pickled(options.source)
        if options.target.exists():
            raise UserError(f"got {options.target}, which exists; allowed: a new file")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    save_file(tensors, options.target, metadata={"source sha256": sha256_file(options.source)})
    for key, value in tensors.items():
        print(f"{key} {tuple(value.shape)} {value.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
