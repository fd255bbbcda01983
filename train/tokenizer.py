"""The tokenizer: a SentencePiece unigram model (spiece.model) in which every word of the world is one piece.

SentencePiece's own training splits rare words into syllables that mean nothing here.  So the trainer only makes the
frame (the normaliser and the special pieces, in T5's order: <pad> 0, </s> 1, <unk> 2), and the pieces are written into
the model file directly: the words of world.py, then punctuation and single letters with a low score, which spell out
every word that is not known.  The normaliser is 26 rules that make letters small, instead of the 240 kB of NFKC.
"""
import io
import pathlib
import shutil
import string
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import T5TokenizerFast

import world
from common import replacing

WORD_SCORE, LETTER_SCORE = -4.0, -12.0


def _frame():
    """A ModelProto with the lower-casing normaliser and T5's special pieces."""
    with tempfile.TemporaryDirectory() as folder:
        rules = pathlib.Path(folder, "rules.tsv")
        rules.write_text("".join(f"{ord(c):X}\t{ord(c.lower()):X}\n" for c in string.ascii_uppercase))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(world.vocabulary()), model_writer=model, vocab_size=64, hard_vocab_limit=False,
            model_type="unigram", normalization_rule_tsv=str(rules), pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def write_spiece(path):
    """Writes spiece.model."""
    proto = _frame()
    del proto.pieces[3:]
    words = ["\u2581" + w for w in world.vocabulary()]
    letters = ["\u2581"] + list(".,!?'-") + list(string.ascii_lowercase + string.digits)
    for piece in words + [x for x in letters if x not in words]:
        proto.pieces.add(piece=piece, score=WORD_SCORE if piece in words else LETTER_SCORE)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    pathlib.Path(path).write_bytes(proto.SerializeToString())


def save(folder):
    """Writes a tokenizer folder that transformers loads, with spiece.model in it. There is none yet, or an empty
    one."""
    with replacing(folder) as new:
        shutil.rmtree(new, ignore_errors=True)  # what a kill has left
        new.mkdir()
        write_spiece(new / "spiece.model")
        T5TokenizerFast.from_pretrained(new, extra_ids=0).save_pretrained(new)


class Tokenizer:
    """Ids of captions by the sentencepiece library itself."""

    def __init__(self, folder):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(pathlib.Path(folder) / "spiece.model"))

    def __len__(self):
        return self.processor.vocab_size()

    def __call__(self, text):
        return self.processor.encode(text) + [1]

    def pieces(self):
        """Every piece, in the order of the ids."""
        return [self.processor.id_to_piece(i) for i in range(len(self))]
