"""Soft tokens: words that were learnt, for what has none (textual inversion, arXiv 2208.01618).

A file is diffusers' own: safetensors with the token as its only key and its vectors (K, D), or
`clip_l` and `clip_g` for the two text encoders of SDXL. Files of ours say in the header which text
encoder they were learnt with: `encoder` and `encoder_bfloat16`, see `encoder_digests`. Those of
before the second was kept have the first alone, and are held to that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expunge.concepts import soft_names
from expunge.errors import UserError
from expunge.results import sha256_file, temporary_beside
from expunge.silence import quiet

FILE = "tokens.safetensors"
METADATA = "expunge"
FORMAT = "expunge.soft_token/1"
# Keys of the header; the first had to do alone for a while, and is what older versions read.
_DIGESTS = {"float16": "encoder", "bfloat16": "encoder_bfloat16"}
_SDXL = ("clip_l", "clip_g")
_NAMELESS = "emb_params"  # A1111's key; there the file's name is the token's
_ALLOWED = "a textual inversion as safetensors, for example the tokens.safetensors of a feedback"


@dataclass(frozen=True)
class SoftToken:
    """A word and its K vectors.

    Attributes:
        name: How prompts call it, for example `<bomb>`.
        vectors: (K, D) for each text encoder.
        encoder: SHA-256 of these, see `encoder_digests`; empty when nobody knows.
    """

    name: str
    vectors: Sequence[Tensor]
    encoder: Mapping[str, str] = field(default_factory=dict)


def locate(file: str | Path) -> Path:
    """The file that a name means: a file, a folder that holds one, or a bundled one.

    Raises:
        UserError: It does not exist, or is a pickle.
    """
    for path in (Path(file), Path(str(resources.files("expunge.models"))) / file):
        for candidate in (path, path / FILE, path / "learned_embeds.safetensors"):
            if candidate.is_file():
                if candidate.suffix != ".safetensors":
                    raise UserError(
                        f"got tokens {file}; allowed: {_ALLOWED}, since a pickle can run code; "
                        "convert it where you trust it"
                    )
                return candidate
    raise UserError(f"got tokens {file}, which do not exist; allowed: {_ALLOWED}")


def read(file: str | Path) -> SoftToken:
    """The token of a file.

    Raises:
        UserError: It is missing, broken or something else.
    """
    path = locate(file)
    try:
        with safe_open(path, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            about = json.loads((stored.metadata() or {}).get(METADATA, "{}"))
        name = about.get("token", "")
        encoder = {at: about[key] for at, key in _DIGESTS.items() if about.get(key)}
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"got tokens {path}, which cannot be read; allowed: {_ALLOWED}; {error}"
        ) from error
    if tensors.keys() == set(_SDXL):
        vectors = [tensors[key] for key in _SDXL]
    elif len(tensors) == 1:
        ((key, only),) = tensors.items()
        name, vectors = name or (path.stem if key == _NAMELESS else key), [only]
    else:
        raise UserError(
            f"got tokens {path} with the keys {', '.join(sorted(tensors)) or 'none'}; allowed: "
            f"one, the token's name, or {' and '.join(_SDXL)}; {_ALLOWED}"
        )
    vectors = [v[None] if v.ndim == 1 else v for v in vectors]
    if any(v.ndim != 2 or not v.numel() or len(v) != len(vectors[0]) for v in vectors):
        raise UserError(
            f"got tokens {path} of shape {[tuple(v.shape) for v in vectors]}; allowed: (K, D), "
            "and the same K for every text encoder"
        )
    if not all(v.float().isfinite().all() for v in vectors):
        raise UserError(f"got tokens {path}, which hold NaN or infinities; learn them again")
    return SoftToken(name or path.stem, vectors, encoder)


def write(file: Path, token: SoftToken, about: Mapping[str, Any]) -> None:
    """Write a token whole or not at all; `about` goes into the file's header as JSON."""
    keys = _SDXL if len(token.vectors) == 2 else (token.name,)
    tensors = {k: v.detach().cpu().contiguous() for k, v in zip(keys, token.vectors, strict=True)}
    own = {"format": FORMAT, "token": token.name}
    own |= {_DIGESTS[at]: digest for at, digest in token.encoder.items()}
    temporary = temporary_beside(file)
    try:
        header = {METADATA: json.dumps({**own, **about}, sort_keys=True)}
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load(pipeline: Any, files: Sequence[str | Path]) -> dict[str, str]:
    """Give a pipeline the tokens of some files, by diffusers' `load_textual_inversion`.

    Returns:
        SHA-256 of each token's file, by the token's name.

    Raises:
        UserError: A file is missing or broken, its vectors have another width than the text
            encoder, it was learnt with other weights, or its name is taken or cannot be read.
    """
    return {add(pipeline, read(file), str(file)): sha256_file(locate(file)) for file in files}


def add(pipeline: Any, token: SoftToken, source: str = "of this run") -> str:
    """Give a pipeline one token, and its name back; see `load`."""
    encoders = list(text_encoders(pipeline))
    widths = [e.get_input_embeddings().weight.shape[1] for _, e in encoders]
    if (found := [v.shape[1] for v in token.vectors]) != widths:
        raise UserError(
            f"got tokens {source} of width {' and '.join(map(str, found))}; allowed: "
            f"{' and '.join(map(str, widths))}, as the text encoder of this model has; learn them "
            "with this model"
        )
    if token.encoder and not token.encoder.items() & encoder_digests(pipeline).items():
        raise UserError(
            f"got tokens {source}, learnt with another text encoder than this model has; allowed: "
            "the same weights, for in others they mean nothing; learn them with this model"
        )
    from transformers.utils import logging

    # It explains how it starts new rows, which are overwritten at once.
    with quiet(logging), torch.random.fork_rng():
        for (tokenizer, encoder), vectors in zip(encoders, token.vectors, strict=True):
            try:
                pipeline.load_textual_inversion(
                    vectors, token=token.name, tokenizer=tokenizer, text_encoder=encoder
                )
            except ValueError as error:
                raise UserError(
                    f"got tokens {source} called {token.name}, which this model knows already; "
                    "allowed: each name once; give it once, or learn it under another name"
                ) from error
            # diffusers expands a name of several vectors only where the tokenizer leaves it as it
            # is; capital letters it does not, and all vectors but the first would be missing.
            whole = pipeline.maybe_convert_prompt(token.name, tokenizer)
            if len(tokenizer(whole).input_ids) != 2 + len(vectors):
                raise UserError(
                    f"got tokens {source} called {token.name}, which this tokenizer does not leave "
                    "whole; allowed: lower case without spaces; rename the key of the file"
                )
    return token.name


def require(pipeline: Any, texts: Iterable[str]) -> None:
    """Refuse texts with a soft token that the pipeline does not have: it would read letters.

    Raises:
        UserError: There is one.
    """
    known = pipeline.tokenizer.get_vocab()
    for text in texts:
        for name in soft_names(text):
            if name not in known:
                have = ", ".join(sorted(pipeline.tokenizer.get_added_vocab())) or "none"
                raise UserError(
                    f"got {name} in {text!r}, a token that this model does not have; allowed: "
                    f"{have}; give its file (concept.tokens, or --tokens), or write it without <>"
                )


def fits(pipeline: Any, texts: Iterable[str], coming: Mapping[str, int] | None = None) -> None:
    """Refuse texts of which a text encoder would not read the end.

    Args:
        pipeline: Whose text encoders read; the longest that fits is their shortest.
        texts: With soft tokens that the pipeline knows, each counted with all its vectors.
        coming: K of soft tokens that it does not know yet, by name.

    Raises:
        UserError: One is too long.
    """
    from transformers.utils import logging

    read, coming = list(texts), coming or {}
    for tokenizer, encoder in text_encoders(pipeline):
        # A tokenizer that was saved without its length gives an astronomic one.
        most = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        extra, bare = [0] * len(read), read
        for name, k in coming.items():
            extra = [n + k * text.count(name) for n, text in zip(extra, bare, strict=True)]
            bare = [text.replace(name, " ") for text in bare]
        with quiet(logging):  # that one is long is said below
            known = [len(token_ids(pipeline, text, tokenizer)) for text in bare]
        for text, *parts in zip(read, extra, known, strict=True):
            n = sum(parts)
            if n > most:
                raise UserError(
                    f"got prompt {text!r}, {n} tokens with the two at its ends; allowed: at most "
                    f"{most} that the text encoder reads; shorten it"
                )


def token_ids(pipeline: Any, text: str, tokenizer: Any = None, **how: Any) -> list[int]:
    """What a tokenizer of the pipeline makes of a text, every soft token as its K vectors.

    Args:
        pipeline: Whose tokens are known.
        text: What is read.
        tokenizer: Default: its first.
        how: Of the tokenizer's own call.
    """
    tokenizer = pipeline.tokenizer if tokenizer is None else tokenizer
    if hasattr(pipeline, "maybe_convert_prompt"):
        text = pipeline.maybe_convert_prompt(text, tokenizer)
    ids: list[int] = tokenizer(text, **how).input_ids
    return ids


def encoder_digests(pipeline: Any) -> dict[str, str]:
    """SHA-256 of the text encoders without tokens that were added, at two precisions.

    One model is published as float32 and float16 files and runs as either or as bfloat16. Rounded
    to one precision they are the same bytes, so encoders are the same if any of these agrees.
    """
    digests = {name: hashlib.sha256() for name in _DIGESTS}
    for tokenizer, encoder in text_encoders(pipeline):
        table = encoder.get_input_embeddings().weight.data_ptr()
        for name, weight in sorted(encoder.state_dict().items()):
            own = weight[: tokenizer.vocab_size] if weight.data_ptr() == table else weight
            own = own.detach().cpu()
            for dtype, digest in digests.items():
                rounded = own.to(getattr(torch, dtype)).flatten().contiguous()
                digest.update(f"{name} {tuple(own.shape)}\0".encode())
                digest.update(rounded.view(torch.uint8).numpy())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def text_encoders(pipeline: Any) -> Iterator[tuple[Any, Any]]:
    """Tokenizer and text encoder, of SDXL both pairs."""
    for suffix in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if encoder is not None:
            yield getattr(pipeline, f"tokenizer{suffix}"), encoder
