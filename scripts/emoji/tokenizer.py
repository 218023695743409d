"""The model's own small vocabulary: byte-level BPE in CLIP's layout, one token per caption word."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from vocabulary import BACKGROUNDS, CATEGORY_WORDS, STYLES, caption, random_scene

CONTEXT = 24
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def build(folder: Path) -> CLIPTokenizer:
    """Train the vocabulary on captions, write it to `folder`, return the tokenizer."""
    rng = random.Random(0)
    corpus = [caption(random_scene(rng, 0.3), rng, 0.1) for _ in range(20_000)]
    corpus += [
        *CATEGORY_WORDS.values(),
        *STYLES,
        *BACKGROUNDS,
        "photo image drawing no not without",
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=4000,
            min_frequency=1,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    bpe.model.save(str(folder))
    merges = (folder / "merges.txt").read_text()
    made = [a + b for a, b in (m.split(" ") for m in merges.splitlines() if not m.startswith("#"))]
    # CLIP's order: bytes, bytes that end a word, merges, start, end (end is the largest id).
    words = [*alphabet, *(c + "</w>" for c in alphabet)]
    words += [w for w in dict.fromkeys(made) if w not in words] + [START, END]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(folder)
    again = CLIPTokenizer.from_pretrained(folder)
    for text in corpus[:500]:
        ids = again(text).input_ids
        assert len(ids) == len(text.split()) + 2, f"not one token per word: {text!r} {ids}"
    return again
