"""Tokenizer: reads pieces, scores, types and rules from a tokenizer file.

Upstream loads umT5's tokenizer.json with the tokenizers library, and a spiece.model alone with the sentencepiece
library. The two give different ids for some texts (normaliser, byte fallback, added tokens), so the weight file states
whose rules hold. A feature that tokenizer.c does not implement is refused by name. The keys are llama.cpp's
tokenizer.ggml.*, and sora.tokenizer.* for what llama.cpp has no key.
"""

import json
import re

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from export.containers import container_of, open_file
from export.files import ExportError, first_bytes, read_json, reading

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece's numbers
MAP = "tokenizer.ggml.precompiled_charsmap"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>$")


def find_tokenizer(path):
    """The tokenizer file of a path: the file itself, or in a folder tokenizer.json, as upstream, else spiece.model.
    Raises ExportError if there is neither."""
    if path.is_file():
        return path
    for name in ("tokenizer.json", "spiece.model"):
        if (path / name).is_file():
            return path / name
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder")
    found = ", ".join(sorted(f.name for f in path.iterdir())) or "nothing"
    raise ExportError(f"{path}: no tokenizer.json or spiece.model, only {found[:120]}: give the one of the original "
                      "release with --tokenizer")


def tokenizer_keys(path, opened=None):
    """{key: value} of a tokenizer file, whose first bytes tell its format. opened: {path: reader} of open weight files.
    Raises ExportError for a file or feature that tokenizer.c cannot use."""
    with reading(path):
        head = first_bytes(path)
        if re.match(rb"\x1f\x8b|(\xef\xbb\xbf)?\s*[{\[]", head):
            return from_tokenizer_json(path, read_json(path))
        if not container_of(head):
            return from_sentencepiece(path, path.read_bytes())
        file = open_file(path, opened)
        return from_own(file) if file.own else from_embedded(file)


def from_own(file):
    """The keys of a weight file that export.py wrote, unchanged."""
    keys = {key: value for key, value in file.keys.items() if key.startswith(("tokenizer.", "sora.tokenizer."))}
    return keys | {MAP: bytes(keys.get(MAP, b""))}


def from_embedded(file):
    """The keys of the tokenizer inside a text encoder's file: llama.cpp's keys in a GGUF, or ComfyUI's tensor of the
    bytes of a spiece.model."""
    if file.keys.get("tokenizer.ggml.model") == "t5":
        return from_gguf(file.keys)
    if "spiece_model" in file.tensors:
        return from_sentencepiece(file.path, file.read("spiece_model", None, None).numpy().tobytes())
    raise ExportError(f"{file.path}: holds no unigram tokenizer, expected tokenizer.ggml.model t5 or a tensor "
                      "spiece_model: give a tokenizer with --tokenizer")


def from_sentencepiece(path, data):
    """The keys of a spiece.model, with the sentencepiece library's rules. data: the file's bytes."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ExportError(f"{path}: not a sentencepiece model, expected spiece.model or tokenizer.json") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces or trainer.model_type != trainer.UNIGRAM:
        raise ExportError(f"{path}: a sentencepiece model of type {trainer.model_type}, {len(model.pieces)} "
                          f"pieces, expected a unigram model (type {trainer.UNIGRAM})")
    if trainer.treat_whitespace_as_suffix:
        raise ExportError(f"{path}: treat_whitespace_as_suffix is not supported")
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    return {
        "tokenizer.ggml.tokens": [p.piece for p in model.pieces],
        "tokenizer.ggml.scores": [p.score for p in model.pieces],
        "tokenizer.ggml.token_type": [p.type for p in model.pieces],
        "tokenizer.ggml.eos_token_id": piece_id(path, ids, trainer.eos_piece),
        "tokenizer.ggml.unknown_token_id": next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN),
        "tokenizer.ggml.padding_token_id": ids.get(trainer.pad_piece, 0),
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        MAP: normalizer.precompiled_charsmap,
        **sentencepiece_rules(normalizer.add_dummy_prefix, trainer.byte_fallback, normalizer.escape_whitespaces),
    }


def sentencepiece_rules(prefix, byte_fallback, escapes=True):
    """The keys that say that the sentencepiece library's rules hold. prefix: whether a space is put before the text;
    escapes: whether spaces become the pieces' mark of a space."""
    return {
        "sora.tokenizer.rules": "sentencepiece",
        "sora.tokenizer.byte_fallback": byte_fallback,
        "sora.tokenizer.escape_whitespaces": escapes,
        "sora.tokenizer.squeeze_spaces": False,
        "sora.tokenizer.split_words": False,
        "sora.tokenizer.prepend_scheme": "always" if prefix else "never",
        "sora.tokenizer.added_ids": [],
    }


def piece_id(path, ids, piece):
    """The id of a piece. Raises ExportError if there is none."""
    if piece not in ids:
        raise ExportError(f"{path}: the vocabulary has no piece {piece}, expected one")
    return ids[piece]


def from_gguf(keys):
    """The keys of a spiece.model that llama.cpp converted. It has byte pieces only if byte fallback is on."""
    types, prefix = keys["tokenizer.ggml.token_type"], bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    return {
        "tokenizer.ggml.tokens": keys["tokenizer.ggml.tokens"],
        "tokenizer.ggml.scores": keys["tokenizer.ggml.scores"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": keys.get("tokenizer.ggml.eos_token_id", 1),
        "tokenizer.ggml.unknown_token_id": types.index(UNKNOWN),
        "tokenizer.ggml.padding_token_id": keys.get("tokenizer.ggml.padding_token_id", 0),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": bool(keys.get("tokenizer.ggml.remove_extra_whitespaces", True)),
        MAP: bytes(keys.get(MAP, b"")),
        **sentencepiece_rules(prefix, BYTE in types),
    }


def from_tokenizer_json(path, config):
    """The keys of a tokenizer.json, with the tokenizers library's rules. config: its JSON object."""
    def refuse(what, found, help=""):
        raise ExportError(f"{path}: {what} {json.dumps(found, ensure_ascii=False)[:80]} is not supported{help}")

    model, meta = config.get("model") or {}, config.get("pre_tokenizer") or {}
    steps = meta.get("pretokenizers") or []
    split_words = meta.get("type") == "Sequence" and len(steps) == 2 and steps[0] == {"type": "WhitespaceSplit"}
    if split_words:  # transformers 5 saves every T5 tokenizer so
        meta = steps[1]
    if model.get("type") != "Unigram" or not model.get("vocab"):
        refuse("model", model.get("type"))
    if meta.get("type") != "Metaspace" or meta.get("replacement") != "\u2581" or meta.get("split", True) is not True:
        refuse("pre_tokenizer", meta)
    scheme = meta.get("prepend_scheme", "always" if meta.get("add_prefix_space", True) else "never")
    if split_words and scheme != "always":
        refuse("pre_tokenizer", meta)
    pieces, scores = [p for p, _ in model["vocab"]], [s for _, s in model["vocab"]]
    types = [BYTE if BYTE_PIECE.match(p) else NORMAL for p in pieces]
    if model.get("unk_id") is None:
        refuse("unk_id", None)
    types[model["unk_id"]] = UNKNOWN
    added = add_tokens(pieces, scores, types, config.get("added_tokens") or [], refuse)
    eos = closing_token(config.get("post_processor") or {}, refuse)
    return {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.unknown_token_id": model["unk_id"],
        "tokenizer.ggml.padding_token_id": pieces.index("<pad>") if "<pad>" in pieces else 0,
        "tokenizer.ggml.add_space_prefix": scheme != "never",
        "tokenizer.ggml.remove_extra_whitespaces": False,
        MAP: b"",
        "sora.tokenizer.rules": "tokenizers",
        "sora.tokenizer.byte_fallback": bool(model.get("byte_fallback", False)),
        "sora.tokenizer.escape_whitespaces": True,
        "sora.tokenizer.squeeze_spaces": squeezes(config.get("normalizer"), refuse),
        "sora.tokenizer.split_words": split_words,
        "sora.tokenizer.prepend_scheme": scheme,
        "sora.tokenizer.added_ids": added,
    }


def add_tokens(pieces, scores, types, tokens, refuse):
    """The sorted ids of the added tokens. A token beyond the vocabulary is appended to pieces, scores and types, as an
    unused piece, which the search does not find."""
    for token in sorted(tokens, key=lambda t: t["id"]):
        if any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")):
            refuse("added token", token)
        while token["id"] >= len(pieces):
            pieces.append(token["content"] if token["id"] == len(pieces) else "")
            scores.append(0.0)
            types.append(UNUSED)
        if pieces[token["id"]] != token["content"]:
            refuse("added token", token)
        if types[token["id"]] not in (UNKNOWN, UNUSED):
            types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    return sorted(t["id"] for t in tokens)


def squeezes(normalizer, refuse):
    """Whether the normaliser turns several spaces into one. Refuses any other normaliser."""
    steps = [normalizer] if normalizer else []
    if steps and normalizer.get("type") == "Sequence":
        steps = normalizer["normalizers"]
    for step in steps:
        if step.get("type") == "Precompiled":
            refuse("normalizer", "Precompiled", "; transformers 5 writes it when it saves a folder that had "
                   "spiece.model alone: give that file with --tokenizer")
        if step != {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}:
            refuse("normalizer", step)
    return bool(steps)


def closing_token(processor, refuse):
    """The id of the token that the post-processor appends to the text. Refuses any other post-processor."""
    single = processor.get("single") or []
    kinds = [kind for step in single for kind in step]
    if processor.get("type") != "TemplateProcessing" or kinds != ["Sequence", "SpecialToken"]:
        refuse("post_processor", processor)
    ids = processor["special_tokens"][single[1]["SpecialToken"]["id"]]["ids"]
    if len(ids) != 1:
        refuse("post_processor", processor)
    return ids[0]
