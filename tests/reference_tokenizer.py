#!/usr/bin/env python3
"""Compares prompt.c and tokenizer.c with their reference libraries, id by id: part of `make test-reference`.

- tokenizers: a tokenizer.json (umT5's own with --umt5 FILE), and small ones made here with options that umT5's does not
  use: prepend schemes, byte fallback, no squeezing of spaces, added tokens outside the vocabulary.
- sentencepiece: models trained here, with each normaliser and each option that changes how text is read.
- transformers: closing `</s>`, padding to the limit, truncation.
- ftfy and html: clean-up, as in diffusers' prompt_clean. Texts whose encoding ftfy guesses are counted, not compared.
- unicodedata: tables.h, and every character up to U+2FFFF among marks, if Python has the same version of Unicode.

The C code is built into a shared object and called through ctypes. The weight files come from export.py, so its reading
of both formats is compared, too. `--goldens` writes the files that `make test` reads.

    python tests/reference_tokenizer.py [--umt5 tokenizer.json[.gz]] [--count 2000] [--goldens tests/goldens/tokenizer]
"""

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import html
import io
import itertools
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
from importlib.metadata import version
from pathlib import Path

import ftfy
import gguf
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.text import tables  # noqa: E402
from export.defaults import NEGATIVE_PROMPT  # noqa: E402
from export.tokenizer import tokenizer_keys  # noqa: E402

LIMIT = 512
SPACE = "\u2581"

# ---------------------------------------------------------------- the C code


class Bytes(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class RawBytes(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def build(folder):
    """prompt.c, tokenizer.c and the engine's files that they need, as a shared object."""
    library = folder / "libtokenizer.so"
    engine = sorted(str(f) for f in (ROOT / "engine").glob("*/*.c"))
    subprocess.run(["cc", "-std=c11", "-O2", "-D_POSIX_C_SOURCE=200809L", "-D_DEFAULT_SOURCE", "-ffp-contract=off",
                    "-fPIC", "-shared", "-Wno-unknown-pragmas", "-I.", "-o", str(library), "prompt.c", "tokenizer.c",
                    *engine, "-lm"], cwd=ROOT, check=True)
    c = ctypes.CDLL(str(library))
    for name in ("weights_open", "tokenizer_load"):
        getattr(c, name).restype = ctypes.c_char_p
    c.prompt_clean.restype, c.prompt_clean.argtypes = RawBytes, [Bytes]
    c.tokenizer_encode.argtypes = [ctypes.c_void_p, Bytes, ctypes.c_void_p, ctypes.c_int]
    c.free = ctypes.CDLL(None).free
    c.free.argtypes = [ctypes.c_void_p]
    return c


class Tokenizer:
    """The tokenizer of a weight file, in C."""

    def __init__(self, c, path):
        self.c, file, self.pointer = c, ctypes.c_void_p(), ctypes.c_void_p()
        why = c.weights_open(str(path).encode(), ctypes.byref(file)) \
            or c.tokenizer_load(file, ctypes.byref(self.pointer))
        if why:
            raise RuntimeError(why.decode())

    def encode(self, text, limit=LIMIT):
        data = text.encode()
        ids = (ctypes.c_int32 * limit)()
        return ids[:self.c.tokenizer_encode(self.pointer, Bytes(data, len(data)), ids, limit)]


def clean_in_c(c, data):
    out = c.prompt_clean(Bytes(data, len(data)))
    text = ctypes.string_at(out.data, out.size) if out.data else b""
    c.free(out.data)
    return text.decode()


def write_weights(path, keys):
    """Writes a weight file with a tokenizer and nothing else. Returns its path."""
    writer = gguf.GGUFWriter(str(path), "wan")
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for key, value in keys.items():
        if type(value) in kinds:
            kinds[type(value)](key, value)
        elif key.endswith("scores"):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=score_type(value))
        elif len(value):
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def score_type(scores):
    """f32, or f64 where f32 would round."""
    exact = all(ctypes.c_float(s).value == s for s in scores)
    return gguf.GGUFValueType.FLOAT32 if exact else gguf.GGUFValueType.FLOAT64


# ---------------------------------------------------------------- strings

SCRIPTS = [(0x20, 0x7E), (0xA0, 0x17F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F),
           (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F),
           (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x1780, 0x17FF),
           (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2100, 0x214F),
           (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x259F), (0x2E80, 0x2EFF), (0x3000, 0x303F),
           (0x3040, 0x30FF), (0x3130, 0x318F), (0x3200, 0x33FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF),
           (0xF900, 0xFAFF), (0xFB00, 0xFB4F), (0xFE00, 0xFE0F), (0xFE20, 0xFE6F), (0xFF00, 0xFFEF), (0xFFF0, 0xFFFD),
           (0x10000, 0x1007F), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F),
           (0x100000, 0x1000FF)]

WORDS = """\
a the red fox jumps over lazy dogs cinematic shot of woman walking down street at night neon rain 4k masterpiece
best quality blurry static worst low JPEG compression residue ugly incomplete extra fingers supercalifragilistic
une renarde rousse saute ein Fuchs springt über faule Hunde лиса прыгает через ленивых собак η αλεπού πηδάει الثعلب
يقفز שועל קופץ लोमड़ी कूदती है สุนัขจิ้งจอก กระโดด con cáo nhảy qua 狐狸跳过懒狗 色调艳丽 过曝 静态 细节模糊不清 きつねが
走る キツネ ｷﾂﾈ 여우가 뛴다 ＦＵＬＬｗｉｄｔｈ １２３ ﬁne ﬂow ǅ ß İ ı Å Å \
e\u0301te\u0301 e\u0323\u0307 Z\u0351\u036b\u0343a\u0328l\u0321
👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇩🇪 1️⃣ ½ ² ™ … “quoted” ‘it’s’ don't 3.14 1,000 $5 50% #tag @name \
http://a.b/c?d=e&f
""".split()

SPECIALS = ["<pad>", "</s>", "<s>", "<unk>", "<extra_id_0>", "<extra_id_1>", "<extra_id_10>", "<extra_id_299>",
            "<extra_id_2", "[eod]", "<0x41>", "<0x0A>", "<0xFF>", "<0xff>", "<sep>", "<sepia>", "<", ">", SPACE,
            SPACE * 2, SPACE + "a", "a" + SPACE, "|x y|", "|x", "<new>", "<new>er", " zz"]
SPACES = [" ", " ", " ", " ", "  ", "   ", "", "\t", "\n", "\u00a0", "\u3000", "\u2003", "\u200b", "\u200d", "\ufeff",
          "\u0085", " \u0001 ", " \u00ad "]


def random_character(rng):
    return chr(rng.randint(*rng.choice(SCRIPTS)))


def random_part(rng):
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(WORDS)
    if kind < 0.75:
        return rng.choice(SPECIALS)
    if kind < 0.9:
        block = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(*block)) for _ in range(rng.randint(1, 8)))
    return "".join(random_character(rng) for _ in range(rng.randint(1, 6)))


def random_text(rng):
    """A random text of words, special tokens and characters of all scripts, with all kinds of white space."""
    parts = [random_part(rng) + rng.choice(SPACES) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 30]))]
    return rng.choice(["", "", "", " ", "  ", SPACE]) + "".join(parts)


def fixed_texts():
    """Yields texts that random ones would miss: no text, only white space, very long words, texts beyond the limit."""
    yield from ["", " ", "  ", "\t", "\u3000", SPACE, SPACE * 3, "a", " a", "a ", "  a  b  ", "a\u0000b",
                "\u0000", "\uffff"]
    yield from SPECIALS + WORDS
    yield from [a + b + c for a in ("", " ", "x") for b in SPECIALS for c in ("", " ", "  y", "y")]
    yield from ["a" * n for n in (100, 1000, 20000)] + [
        "ab" * 300, "supercalifragilistic" * 200, "狐" * 2000, "\u0301" * 700]
    yield from [" ".join(WORDS) * n for n in (1, 2, 3, 30)] + ["\U0001f98a " * 600, "\U00020000" * 600]
    yield from ["red " * n for n in (509, 510, 511, 512, 513)] + ["red " * 511 + "</s>", "<extra_id_0>" * 600]
    for first, last in SCRIPTS:
        for start in range(first, min(last, first + 2048), 64):
            yield "".join(map(chr, range(start, min(start + 64, last + 1))))


def texts(count, seed):
    rng = random.Random(seed)
    return [*fixed_texts(), *(random_text(rng) for _ in range(count))]


def dense_texts(count, seed):
    """Random texts of a few letters.
    The dense vocabularies have almost every string of a, b and space; c and d are unknown."""
    rng = random.Random(seed)
    sizes = [rng.choice([1, 3, 10, 30, 100]) for _ in range(count)] + [2000] * 5
    return ["".join(rng.choice("aaabbb  cd") for _ in range(size)) for size in sizes]


# ---------------------------------------------------------------- comparisons

def compare(name, expected, actual, inputs):
    """Compares expected(text) with actual(text) for all inputs.
    Prints the first differences and returns their number."""
    wrong = 0
    for text in inputs:
        e, a = expected(text), actual(text)
        if e != a:
            wrong += 1
            if wrong <= 3:
                at = next((i for i, (x, y) in enumerate(zip(e, a)) if x != y), min(len(e), len(a)))
                print(f"  {text[:100]!r}: at {at} expected {e[at:at + 12]!r}, got {a[at:at + 12]!r}")
    print(f"{'FAIL' if wrong else 'ok  '} {name:70s} {len(inputs):6d} strings, {wrong} differ", flush=True)
    return wrong


def library_of_transformers(path):
    """A function from text to ids: the call of diffusers' WanPipeline, with a tokenizer.json that transformers does not
    rebuild."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>",
                                                     unk_token="<unk>")

    def encode(text):
        out = tokenizer(text, padding="max_length", max_length=LIMIT, truncation=True, add_special_tokens=True)
        return out["input_ids"][:sum(out["attention_mask"])]
    return encode


def library_of_json(path):
    """A function from text to ids by the tokenizers library, with transformers' truncation."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    library = tokenizers.Tokenizer.from_str(data.decode())
    library.enable_truncation(LIMIT)
    return lambda text: library.encode(text).ids


def library_of_model(data):
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    return lambda text: model.encode(text)[:LIMIT - 1] + [model.piece_to_id("</s>")]


JSON_VARIANTS = {
    "as umT5": {},
    "prepend first": {"prepend": "first"},
    "prepend never": {"prepend": "never"},
    "no squeezing": {"squeeze": False},
    "byte fallback": {"byte_fallback": True},
    "byte fallback, a byte missing": {"byte_fallback": True, "drop": ["<0xF0>"]},
    "scores that f32 rounds": {"noise": 1e-9},
    "scores above 0": {"shift": 30.0},
    "equal scores": {"flat": True},
    "a piece twice": {"twice": True},
}


def dense_vocabulary(score):
    """[(piece, score)]: all strings of one to four of a, b and space. score(n): of the nth piece."""
    strings = ["".join(letters) for n in range(1, 5) for letters in itertools.product("ab" + SPACE, repeat=n)] + ["cd"]
    return [(string, score(n)) for n, string in enumerate(strings)]


# Scores for which many sums are equal, or differ by rounding only; for which sums exceed float32's precision; and for
# which an unknown character costs less than a piece.
DENSE_SCORES = {
    "all equal": lambda n: -10.0,
    "multiples of 0.1": lambda n: -0.1 * (n * 7 % 13 + 1),
    "by length": lambda n: -0.1 * len("abcd"[:1 + (n > 2) + (n > 11) + (n > 38)]),
    "large": lambda n: -4000.0 - 0.37 * (n % 5),
    "positive": lambda n: 25.0 + n % 3,
}


def json_variant(vocab, prepend="always", squeeze=True, byte_fallback=False, drop=(), noise=0.0, shift=0.0, flat=False,
                 twice=False):
    """A tokenizer.json of umT5's kind as a dictionary, with added tokens inside and outside the vocabulary. vocab:
    [(piece, score)]."""
    pieces = [(p, -10.0 if flat and s else s + (shift if s else 0) + noise * i) for i, (p, s) in enumerate(vocab)
              if p not in drop]
    if twice:
        pieces += [(p, s - 1.5) for p, s in pieces[300:400]] + [("", 0.0)]
    ids = {p: i for i, (p, _) in enumerate(pieces)}
    added = [p for p in ("<pad>", "</s>", "<s>", "<unk>", "[eod]") if p in ids]
    tokens = [(ids[p], p) for p in added]
    tokens += [(len(pieces) + i, p) for i, p in enumerate(["<extra_id_1>", "<extra_id_0>", "<extra_id_10>", "<new>",
                                                            "<new>er", "|x y|", "|x", SPACE + "zz"])]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": p, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": i % 2 == 0} for i, p in tokens],
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "} if squeeze else None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prepend, "split": True},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"Sequence": {"id": "A", "type_id": 0}},
                                      {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [ids["</s>"]], "tokens": ["</s>"]}}},
        "decoder": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prepend, "split": True},
        "model": {"type": "Unigram", "unk_id": ids["<unk>"], "vocab": pieces, "byte_fallback": byte_fallback},
    }


TRAINING = {
    "nmt_nfkc": {},
    "identity": {"normalization_rule_name": "identity"},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "byte fallback": {"byte_fallback": True, "vocab_size": 900},
    "identity, byte fallback": {"byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 900},
    "user-defined symbols": {
        "user_defined_symbols": ["<sep>", "<sepia>", "ox", "fox j", "  ", "ＦＵ", SPACE + "a", "＜"]},
    "control symbols": {"control_symbols": ["<extra_id_0>", "[eod]", "red"]},
    "no dummy prefix": {"add_dummy_prefix": False},
    "extra white space kept": {"remove_extra_whitespaces": False},
    "extra white space kept, identity": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "no dummy prefix, white space kept": {"add_dummy_prefix": False, "remove_extra_whitespaces": False,
                                          "byte_fallback": True, "vocab_size": 900},
    "pieces across words": {"split_by_whitespace": False, "user_defined_symbols": ["ox"]},
}


def train(options, corpus):
    """The bytes of a trained sentencepiece model, which begins with pad, </s>, <s>, <unk>, as umT5's."""
    out = io.BytesIO()
    settings = {"vocab_size": 640, "character_coverage": 0.98, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=out, model_type="unigram",
                                             pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, num_threads=2,
                                             **settings)
    return out.getvalue()


def changed_model(data, change):
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    change(model)
    return model.SerializeToString()


def unuse_some(model):
    """Makes every fifth normal piece unused, single characters among them."""
    for piece in [p for p in model.pieces if p.type == p.NORMAL][::5]:
        piece.type = piece.UNUSED


def equal_scores(model):
    for piece in model.pieces:
        piece.score = -10.0


def keep_spaces_plain(model):
    """Replaces U+2581 by spaces, in pieces and text."""
    model.normalizer_spec.escape_whitespaces = False
    for piece in model.pieces:
        piece.piece = piece.piece.replace(SPACE, " ")


def dense_model(model, score, symbols=()):
    """Replaces the trained pieces by the dense vocabulary."""
    del model.pieces[4:]
    for string, value in dense_vocabulary(score):
        kind = model.pieces[0].USER_DEFINED if string in symbols else model.pieces[0].NORMAL
        model.pieces.add(piece=string, score=value, type=kind)


CHANGES = {"unused pieces": unuse_some, "equal scores": equal_scores, "white space not escaped": keep_spaces_plain}


def corpus(seed):
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(1500)]


# ---------------------------------------------------------------- clean-up

UNGUESSED = ftfy.TextFixerConfig(fix_encoding=False, explain=False)


def clean(text, config=UNGUESSED):
    """diffusers' prompt_clean (pipelines/wan/pipeline_wan.py), by default without ftfy's guesses at encodings."""
    text = html.unescape(html.unescape(ftfy.fix_text(text, config))).strip()
    return re.sub(r"\s+", " ", text).strip()


def unguessed(name, inputs):
    """The inputs whose encoding ftfy does not guess. Prints the number of the others."""
    kept = [text for text in inputs if ftfy.fix_text(text) == ftfy.fix_text(text, UNGUESSED)]
    print(f"     ftfy guesses at the encoding of {len(inputs) - len(kept)} of {len(inputs)} {name}", flush=True)
    return kept


# Characters of Unicode 3.2. Their properties are the same in the later versions, of which each Python has another.
KNOWN = [c for c in map(chr, range(0x30000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
ALPHABETS = {script: [c for c in KNOWN
                      if unicodedata.name(c, "").startswith(script) and unicodedata.category(c)[0] in "LM"]
             for script in ("LATIN SMALL", "LATIN CAPITAL", "FULLWIDTH LATIN", "GREEK", "CYRILLIC", "ARMENIAN",
                            "HEBREW", "ARABIC LETTER", "SYRIAC", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI",
                            "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "THAI", "LAO", "TIBETAN",
                            "MYANMAR", "GEORGIAN", "HANGUL", "ETHIOPIC", "KHMER", "MONGOLIAN", "HIRAGANA", "KATAKANA",
                            "HALFWIDTH KATAKANA", "CJK UNIFIED")}
BETWEEN = [*" " * 12, ", ", ". ", "，", "。", "！", "（", "）", "　", " “", "” ", " ‘", "’", "'", " - ", " … ", " & ",
           "&amp;", "&quot;", "\n", "\r\n", "\u2028", "\ufeff", " 12 ", "１２", "\u00a0"]


def sentence(rng, script):
    """A random sentence in one script: composed or decomposed, with punctuation of any script."""
    words = ("".join(rng.choices(ALPHABETS[script], k=rng.randint(1, 9))) for _ in range(rng.randint(1, 12)))
    text = "".join(word + rng.choice(BETWEEN) for word in words)
    return unicodedata.normalize(rng.choice(["NFC", "NFD"]), text)


EXAMPLE = "a cafe&amp;#769;,  “Ｏｐｅｎ”\r\n"  # of prompt.c


def sentences(count, seed):
    """Yields the released models' negative prompt, prompt.c's example, and random sentences in all alphabets."""
    rng = random.Random(seed)
    yield from (NEGATIVE_PROMPT, EXAMPLE)
    for i in range(count):
        yield sentence(rng, list(ALPHABETS)[i % len(ALPHABETS)])


def pools():
    """Lists of characters that ftfy repairs: marks, compositions and their parts, Hangul, widths, controls, terminal
    escapes."""
    parts = [c for c in KNOWN if unicodedata.decomposition(c)]
    return [[c for c in KNOWN if unicodedata.combining(c)], parts, list(unicodedata.normalize("NFD", "".join(parts))),
            [chr(c) for c in (*range(0xAC00, 0xD7A4, 31), *range(0x1100, 0x1200))],
            [chr(c) for c in range(0xFE00, 0x10000)],
            [chr(c) for c in (*range(0x20), *range(0x7F, 0xA0), *range(0x132, 0x14A), *range(0x1C4, 0x1F4), 0x2BC,
                              *range(0x2010, 0x2070), 0x3000, *range(0xFB00, 0xFB07))],
            [c for c in KNOWN if c.isdecimal()], list("abcXYZ &<;#\n\r\033[;m019"), KNOWN,
            ["&amp;", "&lt;", "\033[", "\033[1;31m", "\r\n", "&#", "&eacute;", "&EACUTE;", "&nbsp;", "&#x85;", "&#769;",
             "&ﬁlig;"]]


def disordered(count, seed):
    """Yields random strings that need many repairs at once."""
    rng, every = random.Random(seed), pools()
    for _ in range(count):
        some = rng.choices(every, k=rng.choice([1, 2, 3, 9]))
        yield "".join(rng.choice(rng.choice(some)) for _ in range(rng.choice([1, 2, 3, 5, 8, 20, 60])))


def nested_reference(rng, character, depth):
    """An HTML reference to a character, in which some characters are references, `depth` levels deep."""
    code = ord(character)
    text = rng.choice([f"&#{code};", f"&#x{code:x};"] + ["&amp;", "&AMP;"] * 2 * (character == "&") +
                      ["&lt;"] * (character == "<"))
    return "".join(nested_reference(rng, c, depth - 1) if depth and rng.random() < 0.3 else c for c in text)


def nested(count, seed):
    """Yields nested references among escapes, marks, widths and line breaks."""
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice([
            lambda: nested_reference(rng, rng.choice("&&&<;#eé[m1\ufeff\u0301\u0323\u037e；＆１\r\n\x1b\x85"),
                                     rng.randint(0, 4)),
            lambda: "&" + rng.choice(["amp;", "#38;", "AMP;", "#x26;"]) * rng.randint(1, 5) +
                    rng.choice(["lt;", "#769;", "#91;", ""]),
            lambda: rng.choice(["\x1b", "\x1b[", "[31m", "e", "\u0301", "；", "＆", ";", "&", "&#", "amp", "\r",
                                "\ufeff", "\n"]),
        ])() for _ in range(rng.randint(1, 6)))


def blocks():
    """Yields (first, text) for every 4096 characters up to U+2FFFF: each alone, and between a letter and two marks."""
    for first in range(0, 0x30000, 0x1000):
        characters = [chr(c) for c in range(first, first + 0x1000) if not 0xD800 <= c < 0xE000]
        if characters:
            yield first, "\n".join(f"a{c}\u0323\u0301{c}" for c in characters)


def tables_match():
    """Whether Python has the version of Unicode of tables.h; if so, tables.py must write the same."""
    committed, out = (ROOT / "engine/text/tables.h").read_text(), io.StringIO()
    if f"Unicode {unicodedata.unidata_version}," not in committed:
        print(f"left out: every character, since this Python has Unicode {unicodedata.unidata_version}")
        return False
    with contextlib.redirect_stdout(out):
        tables.main()
    if out.getvalue().split("\n", 1)[1] != committed.split("\n", 1)[1]:
        sys.exit("engine/text/tables.h is not what engine/text/tables.py writes")
    return True


def random_prompt(rng):
    names = [n for n in html.entities.html5]
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randrange(12)
        name = rng.choice(names)
        number = rng.choice([rng.randrange(0x120), rng.randrange(0x30000), rng.randrange(0xD700, 0xE100),
                             rng.choice([0xFDD0, 0xFFFE, 0xFFFF, 0x1FFFE, 0x10FFFF, 0x110000, 10 ** 12, 59, 38, 8217])])
        parts.append([
            lambda: "&" + name, lambda: "&" + name.upper(), lambda: "&" + name.rstrip(";") + rng.choice("x1; _é&<"),
            lambda: "&amp;" * rng.randint(1, 3) + name, lambda: "&" + "amp;" * rng.randint(1, 5) + name,
            lambda: f"&#{number:0{rng.choice([1, 1, 24, 25, 30])}}" + rng.choice([";", "", "x", "1;"]),
            lambda: f"&#{rng.choice('xX')}{number:x}" + rng.choice([";", "", "g", "0;"]),
            lambda: rng.choice(["&", "&#", "&#x", "&#;", "&#x;", "&;", "&a;", "<b>", "\n", "\r\n", "<", "&lt;", "&lt"]),
            lambda: rng.choice("‘’‚‛“”„‟ʼ'\"«»"), lambda: random_part(rng), lambda: rng.choice(SPACES) * 2,
            lambda: chr(rng.choice([*range(0x20), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2030),
                                    0x205F, 0x3000, 0xFEFF]))][kind]())
    data = "".join(parts).encode(errors="replace")
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            at = rng.randint(0, len(data))
            data = data[:at] + bytes(rng.choice([0, 0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0xED, 0xA0, 0xF0, 0xF4, 0x90,
                                                 0xF8, 0xFF])
                                     for _ in range(rng.randint(1, 4))) + data[at + rng.randint(0, 2):]
    return data


def prompts(count, seed):
    """Yields bytes: every entity in every form, every white space and control character,
    short strings that are not UTF-8."""
    rng = random.Random(seed)
    for name in html.entities.html5:
        bare = name.rstrip(";")
        yield from (s.encode() for s in (f"a&{name}b", f"&{bare};", f"&{bare}", f"&{bare.upper()};", f"&{bare}z;"))
    yield from (f"a{chr(c)}b&#{c};c&#x{c:x}".encode() for c in range(0x3100) if not 0xD800 <= c < 0xE000)
    yield from (bytes([lead, second, third, 0x41]) for lead in range(0x80, 0x100)
                for second in (0x41, *range(0x7F, 0xC1, 5)) for third in (0x20, 0x80, 0xBF, 0xF0))
    yield from (b"\xf0\x9f\xa6\x8a"[:n] for n in range(5))
    yield from (random_prompt(rng) for _ in range(count))


# ---------------------------------------------------------------- goldens

GOLDENS = {
    "sentencepiece, user-defined symbols": "nmt_nfkc",
    "sentencepiece, identity, byte fallback": "byte_fallback",
    "sentencepiece, extra white space kept, identity": "spaces_kept",
    "sentencepiece, dense scores, multiples of 0.1, user-defined symbols": "dense_float",
    "tokenizers, as umT5": "umt5_like",
    "tokenizers, byte fallback": "json_bytes",
    "tokenizers, dense scores, positive": "dense_double",
    "tokenizers, saved anew by transformers": "resaved",
}


def escape(data):
    """Bytes as a text: printable ASCII, other bytes as \\xNN."""
    return "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in data)


def write_goldens(folder, models):
    """Writes a weight file and lines `text TAB ids` for each model, and lines `prompt TAB text` for the clean-up."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    for name, keys, library, inputs in models:
        chosen = rng.sample([t for t in inputs if len(t) < 100], 100) + ["", "red " * 513]
        write_weights(folder / f"{name}.gguf", keys)
        lines = [f"{escape(t.encode())}\t{' '.join(map(str, library(t)))}\n" for t in chosen]
        (folder / f"{name}.txt").write_text("".join(lines))
    chosen = rng.sample([p for p in prompts(1000, 5) if len(p) < 100], 300)
    short = [text for text in (*sentences(500, 6), *disordered(500, 7)) if len(text) < 30]
    chosen += [text.encode() for text in (NEGATIVE_PROMPT, EXAMPLE, *rng.sample(short, 298))]
    lines = [f"{escape(p)}\t{escape(clean(p.decode(errors='replace')).encode())}\n" for p in chosen]
    (folder / "clean.txt").write_text("".join(lines))
    if tables_match():
        lines = [f"{first:x}\t{hashlib.sha256(clean(text).encode()).hexdigest()}\n" for first, text in blocks()]
        (folder / "characters.txt").write_text("".join(lines))
    (folder / "VERSIONS").write_text(
        f"python {platform.python_version()}, tokenizers {tokenizers.__version__}, "
        f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}, "
        f"ftfy {ftfy.__version__}, gguf {version('gguf')}, Unicode {unicodedata.unidata_version}\n"
        "python tests/reference_tokenizer.py --goldens tests/goldens/tokenizer\n")


# ---------------------------------------------------------------- all of it

class Comparison:
    """Compares the C code with the libraries. strings, wrong: number of texts compared, and of those that differ."""

    def __init__(self, folder, count):
        self.c, self.folder, self.count, self.goldens = build(folder), folder, count, []
        self.strings, self.wrong = 0, 0

    def compare(self, name, expected, actual, inputs):
        self.wrong += compare(name, expected, actual, inputs)
        self.strings += len(inputs)

    def clean_up(self):
        """Compares the clean-up of prompts as bytes, of strings that need many repairs, and of every character."""
        def in_c(text):
            return clean_in_c(self.c, text.encode())
        self.compare("clean-up of references, spaces and bytes", lambda p: clean(p.decode(errors="replace")),
                     lambda p: clean_in_c(self.c, p), list(prompts(self.count, 1)))
        inputs = list(disordered(10 * self.count, 2))
        self.compare("clean-up of what needs many repairs", clean, in_c, inputs)
        self.compare("clean-up of nested references", clean, in_c, list(nested(10 * self.count, 12)))
        unguessed("strings that need many repairs", inputs)
        unguessed("prompts in many languages", corpus(3))
        if tables_match():
            self.compare("clean-up of every character", clean, in_c, [text for _, text in blocks()])

    def whole(self, name, path, library):
        """Compares clean-up and tokenizer together, with ftfy's default as upstream."""
        tokenizer = Tokenizer(self.c, write_weights(self.folder / "model.gguf", tokenizer_keys(path)))
        inputs = unguessed("sentences", list(sentences(3 * self.count, 4)))
        assert NEGATIVE_PROMPT in inputs
        self.compare(f"{name}, sentences in {len(ALPHABETS)} alphabets as typed",
                     lambda text: library(clean(text, None)),
                     lambda text: tokenizer.encode(clean_in_c(self.c, text.encode())), inputs)

    def tokenizer(self, name, path, library, inputs):
        """Compares the tokenizer file at `path`. library: a function from text to ids."""
        keys = tokenizer_keys(path)
        tokenizer = Tokenizer(self.c, write_weights(self.folder / "model.gguf", keys))
        self.compare(name, library, tokenizer.encode, inputs)
        if name in GOLDENS:
            self.goldens.append((GOLDENS[name], keys, library, inputs))

    def model(self, name, data, inputs):
        path = self.folder / "spiece.model"
        path.write_bytes(data)
        self.tokenizer(f"sentencepiece, {name}", path, library_of_model(data), inputs)

    def json(self, name, config, inputs, library=library_of_json):
        path = self.folder / "tokenizer.json"
        path.write_text(json.dumps(config))
        self.tokenizer(f"tokenizers, {name}", path, library(path), inputs)


def compare_trained(comparison, learned):
    """Compares sentencepiece models with every option, two of them with changes that no option makes."""
    for seed, (name, options) in enumerate(TRAINING.items()):
        data = train(options, learned)
        comparison.model(name, data, texts(comparison.count, 10 + seed))
        for change in CHANGES if name in ("nmt_nfkc", "user-defined symbols") else ():
            changed = changed_model(data, CHANGES[change])
            comparison.model(f"{name}, {change}", changed, texts(comparison.count, 50 + seed))


def compare_json(comparison, learned):
    """Compares tokenizer.json with every option that export.py accepts."""
    trained = sentencepiece_model_pb2.ModelProto.FromString(train(TRAINING["identity, byte fallback"], learned))
    vocab = [(p.piece, p.score) for p in trained.pieces] + [("[eod]", 0.0)]
    for seed, (name, options) in enumerate(JSON_VARIANTS.items()):
        comparison.json(name, json_variant(vocab, **options), texts(comparison.count, 100 + seed))
    comparison.whole("tokenizers, a piece twice", comparison.folder / "tokenizer.json",
                     library_of_json(comparison.folder / "tokenizer.json"))
    comparison.json("through transformers", json_variant(vocab), texts(comparison.count, 99), library_of_transformers)


def compare_dense(comparison, learned):
    """Compares vocabularies in which many paths have equal or nearly equal scores, by both libraries' rules."""
    plain = train(TRAINING["identity"], learned)
    for seed, (name, score) in enumerate(DENSE_SCORES.items()):
        inputs = dense_texts(comparison.count, 200 + seed)
        for symbols in ([], ["ab", "aba", "bab", "b" + SPACE]):
            dense = changed_model(plain, lambda model: dense_model(model, score, symbols))
            comparison.model(f"dense scores, {name}{', user-defined symbols' * bool(symbols)}", dense, inputs)
        special = [(p, score(0)) for p in ("<pad>", "</s>", "<s>", "<unk>")]
        comparison.json(f"dense scores, {name}", json_variant(special + dense_vocabulary(score)), inputs)


def compare_resaved(comparison, learned):
    """Compares a tokenizer.json that transformers loaded and saved: it splits words first and has another unknown id.
    The texts have single spaces only, like cleaned prompts."""
    trained = sentencepiece_model_pb2.ModelProto.FromString(train(TRAINING["identity, byte fallback"], learned))
    vocab = [(p.piece, p.score) for p in trained.pieces] + [("[eod]", 0.0)]
    before, after = comparison.folder / "before", comparison.folder / "after"
    before.mkdir()
    (before / "tokenizer.json").write_text(json.dumps(json_variant(vocab)))
    (before / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}))
    transformers.AutoTokenizer.from_pretrained(before).save_pretrained(after)
    path = after / "tokenizer.json"
    inputs = [" ".join(text.split()) for text in texts(comparison.count, 300)]
    comparison.tokenizer("tokenizers, saved anew by transformers", path, library_of_json(path), inputs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--umt5", type=Path, help="umT5's own tokenizer.json or tokenizer.json.gz")
    parser.add_argument("--count", type=int, default=2000, help="random strings per vocabulary")
    parser.add_argument("--goldens", type=Path, help="also write the goldens into this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(Path(folder), args.count)
        comparison.clean_up()
        if args.umt5:
            library = library_of_json(args.umt5)
            comparison.tokenizer("tokenizers, umT5 itself", args.umt5, library, texts(args.count, 2))
            comparison.whole("tokenizers, umT5 itself", args.umt5, library)
        learned = corpus(3)
        compare_trained(comparison, learned)
        compare_json(comparison, learned)
        compare_dense(comparison, learned)
        compare_resaved(comparison, learned)
        if args.goldens:
            write_goldens(args.goldens, comparison.goldens)
    print(f"{comparison.strings - comparison.wrong} passed, {comparison.wrong} failed")
    sys.exit(comparison.wrong > 0)


if __name__ == "__main__":
    main()
