"""Tokenizers: the files that contain one, and the rules of each."""

import json
import shutil

import gguf
import pytest
from export.tokenizer import tokenizer_keys
from helpers import change_json, export, keys, refused

import make_checkpoint


def tokenizer_json(**changes):
    """A small tokenizer.json with umT5's rules."""
    pieces = ["<pad>", "</s>", "<s>", "<unk>", "\u2581", "a", "b", "\u2581a", "<0x41>"]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in range(4)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [[p, -float(i)] for i, p in enumerate(pieces)],
                  "byte_fallback": False}} | changes


def with_tokenizer(tmp_path, folders, config):
    from tokenizers import Tokenizer
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    (copy / "tokenizer/tokenizer.json").write_text(json.dumps(config))
    Tokenizer.from_file(str(copy / "tokenizer/tokenizer.json"))  # the library accepts it
    return copy


def test_tokenizer_json_is_the_truth_where_there_is_one(tmp_path, folders):
    added = {"id": 11, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": False}
    config = tokenizer_json()
    config["added_tokens"].append(added)
    values = keys(export(with_tokenizer(tmp_path, folders, config), tmp_path / "out.gguf"))
    assert values["tokenizer.ggml.tokens"][4:] == ["\u2581", "a", "b", "\u2581a", "<0x41>", "", "", "<x>"]
    assert values["tokenizer.ggml.token_type"] == [3, 3, 3, 2, 1, 1, 1, 1, 6, 5, 5, 5]
    assert values["tokenizer.ggml.scores"][5:8] == [-5.0, -6.0, -7.0]
    assert values["sora.tokenizer.added_ids"] == [0, 1, 2, 3, 11]
    assert values["sora.tokenizer.rules"] == "tokenizers"
    assert values["sora.tokenizer.squeeze_spaces"] is True and values["sora.tokenizer.byte_fallback"] is False
    assert values["sora.tokenizer.prepend_scheme"] == "always"
    assert values["tokenizer.ggml.eos_token_id"] == 1 and values["tokenizer.ggml.unknown_token_id"] == 3
    assert "tokenizer.ggml.precompiled_charsmap" not in values


@pytest.mark.parametrize("says, changes", [
    ("normalizer", {"normalizer": {"type": "NFKC"}}),
    ("normalizer", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    ("pre_tokenizer", {"pre_tokenizer": None}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}]}}),
    ("normalizer", {"normalizer": {"type": "Strip", "strip_left": False, "strip_right": True}}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}}),
    ("post_processor", {"post_processor": None}),
    ("added token", {"added_tokens": [{"id": 1, "content": "</s>", "single_word": False, "lstrip": True,
                                       "rstrip": False, "normalized": False, "special": True}]}),
    ("model", {"model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}})])
def test_rules_that_sora_does_not_have_are_refused(tmp_path, folders, capsys, says, changes):
    copy = with_tokenizer(tmp_path, folders, tokenizer_json(**changes))
    line = refused(capsys, tmp_path / "out.gguf", copy)
    assert f"tokenizer.json: {says}" in line and "not supported" in line


def test_spiece_model_alone(tmp_path):
    import sentencepiece
    path = tmp_path / "spiece.model"
    path.write_bytes(make_checkpoint.train_tokenizer("nmt_nfkc"))
    model = sentencepiece.SentencePieceProcessor(str(path))
    values, size = tokenizer_keys(path), model.get_piece_size()
    assert values["tokenizer.ggml.tokens"] == [model.id_to_piece(i) for i in range(size)]
    assert values["tokenizer.ggml.scores"] == [model.get_score(i) for i in range(size)]
    kinds = values["tokenizer.ggml.token_type"]
    assert [k == 6 for k in kinds] == [model.is_byte(i) for i in range(size)]
    assert [k == 3 for k in kinds] == [model.is_control(i) for i in range(size)]
    assert values["tokenizer.ggml.unknown_token_id"] == model.unk_id() == kinds.index(2)
    assert values["tokenizer.ggml.eos_token_id"] == model.eos_id()
    assert values["sora.tokenizer.rules"] == "sentencepiece" and values["sora.tokenizer.byte_fallback"] is True
    assert len(values["tokenizer.ggml.precompiled_charsmap"]) > 100000


def test_normaliser_map_is_written_as_bytes(tmp_path, folders):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    path = copy / "tokenizer/spiece.model"
    path.write_bytes(make_checkpoint.train_tokenizer("nmt_nfkc"))
    field = export(copy, tmp_path / "out.gguf").fields["tokenizer.ggml.precompiled_charsmap"]
    assert field.types[1] == gguf.GGUFValueType.UINT8
    assert bytes(field.contents()) == tokenizer_keys(path)["tokenizer.ggml.precompiled_charsmap"]


def split_first(**changes):
    """The pre-tokenizer that transformers 5 writes for every T5 tokenizer."""
    return {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True} | changes]}


def resaved(folder, source):
    """The folder of a tokenizer after transformers loaded and saved it."""
    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    return folder


def test_a_tokenizer_json_that_transformers_saved_anew(tmp_path, folders):
    copy = with_tokenizer(tmp_path, folders, tokenizer_json())
    change_json(copy / "tokenizer/tokenizer_config.json", extra_ids=0)  # this vocabulary has none, umT5's has 300
    folder = resaved(tmp_path / "resaved", copy / "tokenizer")
    config = json.loads((folder / "tokenizer.json").read_text())
    assert config["pre_tokenizer"] == split_first() and config["normalizer"] is None
    before = keys(export(copy, tmp_path / "before.gguf"))
    after = keys(export(copy, tmp_path / "after.gguf", "--tokenizer", folder))
    differ = {k for k in before if before[k] != after.get(k) and not k.startswith("sora.source.")}
    assert differ == {"sora.tokenizer.split_words", "sora.tokenizer.squeeze_spaces", "tokenizer.ggml.unknown_token_id",
                      "tokenizer.ggml.token_type"}
    assert after["sora.tokenizer.split_words"] is True
    assert after["tokenizer.ggml.unknown_token_id"] == config["model"]["unk_id"] == 2


def test_a_spiece_model_that_transformers_saved_anew(tmp_path, folders, capsys):
    source = shutil.copytree(folders / "diffusers/tokenizer", tmp_path / "source")
    (source / "spiece.model").write_bytes(make_checkpoint.train_tokenizer("nmt_nfkc"))
    folder = resaved(tmp_path / "resaved", source)
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--tokenizer", folder)
    assert "tokenizer.json: normalizer \"Precompiled\" is not supported" in line and "--tokenizer" in line
    assert "when it saves a folder that had spiece.model alone" in line


@pytest.mark.parametrize("changes", [
    {"pre_tokenizer": split_first()}, {"normalizer": None}, {"truncation": {
        "direction": "Right", "max_length": 77, "strategy": "LongestFirst", "stride": 0}},
    {"padding": {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<pad>"}},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "str_rep": "\u2581", "add_prefix_space": True}}])
def test_rules_that_sora_has(tmp_path, folders, changes):
    copy = with_tokenizer(tmp_path, folders, tokenizer_json(**changes))
    file = keys(export(copy, tmp_path / "out.gguf"))
    assert file["sora.tokenizer.split_words"] is ("Sequence" in str(changes))
    assert file["sora.tokenizer.squeeze_spaces"] is ("normalizer" not in changes)


@pytest.mark.parametrize("content, says", [
    ("{", "cannot be read"), ("[]", "holds a list, expected a JSON object"), ("", "is empty"),
    ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', 'model "BPE" is not supported')])
def test_a_tokenizer_json_that_is_none(tmp_path, folders, capsys, content, says):
    (tmp_path / "tokenizer.json").write_text(content)
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--tokenizer", tmp_path)
    assert f"tokenizer.json: {says}" in line


def test_a_byte_order_mark_is_passed_over(tmp_path, folders):
    (tmp_path / "tokenizer.json").write_text("\ufeff" + json.dumps(tokenizer_json()))
    file = export(folders / "diffusers", tmp_path / "out.gguf", "--tokenizer", tmp_path)
    assert keys(file)["sora.tokenizer.rules"] == "tokenizers"


def test_a_folder_without_a_tokenizer_says_what_helps(tmp_path, folders, capsys):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/vocab.json").touch()
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--tokenizer", tmp_path / "t")
    assert "no tokenizer.json or spiece.model, only vocab.json: give the one of the original release" in line
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--tokenizer", tmp_path / "nowhere")
    assert "nowhere: no such file or folder" in line


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_file_of_weights_that_carries_no_tokenizer(tmp_path, folders, capsys, part):
    path = next((folders / "diffusers" / part).glob("*.safetensors"))
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--tokenizer", path)
    assert "holds no unigram tokenizer" in line
