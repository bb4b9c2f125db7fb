"""Lossless, deterministic, and with the ids and the end of document that Megatron gives for the same file."""

import base64
import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import sentences, write_jsonl
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_opt.data import train_tokenizer as train_module
from megatron_opt.data.adopt_tokenizer import adopt_tokenizer
from megatron_opt.data.tokenizer import load_tokenizer
from megatron_opt.data.train_tokenizer import train_tokenizer
from megatron_opt.errors import UserError
from tests import apart

SAMPLES = [
    *(sentences(20, seed) for seed in range(900, 920)),
    "  leading and trailing  ",
    "a\n\n\n\n  b\n \n\tc\r\nd",
    "<s> </s> <unk> <0x0A> <|endoftext|> text that looks special",
    "1234567890 你好 🙂 e\u0301 \u00a0\u2028 ﬁ Å",
]  # fmt: skip


def hugging_face(folder, eos):
    folder.mkdir()
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", eos], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentences(300, 1)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ranks(path):
    """Bare ranks whose single bytes are in another order than 0, 1, 2, as those of GPT-2 are."""
    tokens = [bytes([i]) for i in reversed(range(256))] + [b"th", b" th", b" the", b"in", b"an", b" s"]
    path.write_bytes(b"".join(base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens)))
    return path


def megatrons(flags, monkeypatch):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    args = parse_args()
    args.rank, args.pad_vocab_size = 0, True
    return build_tokenizer(args)


def agree(ours, monkeypatch):
    theirs = megatrons(ours.flags, monkeypatch)
    for text in SAMPLES:
        assert ours.encode(text) == theirs.tokenize(text)
    assert (ours.eod, ours.vocab_size) == (theirs.eod, theirs.vocab_size)


def test_sentencepiece_agrees_with_megatron(model, monkeypatch):
    agree(load_tokenizer(model), monkeypatch)


@pytest.mark.parametrize(("pattern", "special_tokens"), [("v1", 7), ("v2", 1000)])
def test_tiktoken_agrees_with_megatron(tmp_path, monkeypatch, pattern, special_tokens):
    output = tmp_path / "out" / "ranks.json"
    ours = adopt_tokenizer(ranks(tmp_path / "r.tiktoken"), output, pattern=pattern, special_tokens=special_tokens)
    agree(ours, monkeypatch)
    assert [ours.decode(ours.encode(text)) for text in SAMPLES if "</s>" not in text] == [
        text for text in SAMPLES if "</s>" not in text
    ]


@pytest.mark.parametrize(("eos", "begin"), [("</s>", False), ("<|done|>", True)])
def test_hugging_face_agrees_with_megatron(tmp_path, monkeypatch, eos, begin):
    apart.transformers()  # Megatron's HuggingFaceTokenizer needs it
    source = hugging_face(tmp_path / "source", eos)
    if begin:
        tokenizer = HfTokenizer.from_file(str(source))
        tokenizer.post_processor = processors.TemplateProcessing("<pad> $A", "<pad> $A $B", [("<pad>", 0)])
        tokenizer.save(str(source))
    ours = adopt_tokenizer(source, tmp_path / "out" / "tokenizer.json", eod_token=eos)
    agree(ours, monkeypatch)
    assert (ours.encode("the")[0] == 0) is begin


def test_null_tokenizer_has_the_same_vocabulary_and_end(model, monkeypatch):
    ours = load_tokenizer(model)
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(ours.vocab_size)]
    theirs = megatrons([*flags, "--null-tokenizer-eod-id", str(ours.eod)], monkeypatch)
    assert (theirs.vocab_size, theirs.eod) == (ours.vocab_size, ours.eod)


def test_hugging_face_end_of_document(tmp_path):
    usual = load_tokenizer(hugging_face(tmp_path / "usual", "</s>"))
    assert usual.eod == 1 and usual.decode(usual.encode(SAMPLES[0])) == SAMPLES[0]
    path = hugging_face(tmp_path / "own", "<|done|>")
    with pytest.raises(UserError, match="--eod TOKEN"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="no token '<end>'"):
        adopt_tokenizer(path, tmp_path / "out" / "tokenizer.json", eod_token="<end>")
    ours = adopt_tokenizer(path, tmp_path / "out" / "tokenizer.json", eod_token="<|done|>")
    assert ours.eod == 1
    assert load_tokenizer(tmp_path / "out").eod == 1, "the folder keeps the choice"
    with pytest.raises(UserError, match="name the output"):
        adopt_tokenizer(path, tmp_path / "mine.json", eod_token="<|done|>")


def test_tiktoken_merges_do_not_depend_on_the_order_of_bytes(tmp_path):
    import tiktoken

    source = ranks(tmp_path / "r.tiktoken")
    known = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, source.read_bytes().splitlines())}
    ours = adopt_tokenizer(source, tmp_path / "ranks.json", special_tokens=7)
    theirs = tiktoken.Encoding("t", pat_str=ours._model._pat_str, mergeable_ranks=known, special_tokens={})
    for text in SAMPLES[:20]:
        pieces = [ours._model.decode_single_token_bytes(i) for i in ours.encode(text)]
        assert pieces == [theirs.decode_single_token_bytes(i) for i in theirs.encode(text)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_trained_tokenizer_is_lossless(model, text):
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < i < tokenizer.vocab_size for i in ids), "no unk, bos or eos comes out of text"


def test_training_is_deterministic_and_done_once(tmp_path, corpus, model):
    output = tmp_path / "t.model"
    train_tokenizer(corpus, 400, output)
    assert output.read_bytes() == model.read_bytes()
    before = output.stat().st_mtime_ns
    train_tokenizer(corpus, 400, output)
    assert output.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="vocab_size differ"):
        train_tokenizer(corpus, 410, output)
    assert train_tokenizer(corpus, 410, output, force=True).vocab_size == 410


def test_tokenizer_of_somebody_else_is_kept(tmp_path, corpus, model):
    (tmp_path / "t.model").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"t\.model exists .*--force"):
        train_tokenizer(corpus, 400, tmp_path / "t.model")
    with pytest.raises(UserError, match=r"t\.model exists .*--force"):
        adopt_tokenizer(model, tmp_path / "t.model")
    assert (tmp_path / "t.model").read_bytes() == b"mine"


def test_sampling_takes_about_the_share_asked_for(corpus, texts):
    size = sum(map(len, texts))
    taken = sum(map(len, train_module._lines(corpus, "text", corpus.stat().st_size // 2)))
    assert 0.3 * size < taken < 0.7 * size


def test_vocabulary_that_the_corpus_cannot_fill(tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", ["hello world"])
    with pytest.raises(UserError, match=r"too little text for 3000 pieces; give --vocab-size \d+ or less"):
        train_tokenizer(source, 3000, tmp_path / "t.model")
    with pytest.raises(UserError, match=r"does not hold the letters .* give \d+ or more"):
        train_tokenizer(source, 20, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no text"),
        ('{"text": ""}\n', "holds no text"),
        ('{"text": "x"}\n{', "line 2: malformed JSON"),
        ('{"body": "x"}', "no key 'text', there are 'body'"),
    ],
)
def test_bad_training_corpus(tmp_path, text, says):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        train_tokenizer(tmp_path / "c.jsonl", 300, tmp_path / "t.model")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"not a model at all", "not a SentencePiece model"),
        (b'{"version": "1.0"}', "not a Hugging Face tokenizer.json"),
        (b'[{"rank": 0}]', "not a list of rank"),
        (b"[]", "single bytes in order"),
        (b'[{"rank": 1, "token_bytes": "AA==", "token_str": ""}]', "ranks must be 0, 1, 2"),
        (b"aGk= 0\nbHU= 1\n", "bare tiktoken ranks.*--from"),
    ],
)
def test_foreign_tokenizers(tmp_path, content, says):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"aGk= 0\nbHU= 2\n", "line 2: rank 1 is expected, not 2"),
        (b"aGk= 0\nbHU\n", "line 2: a base64 token and its rank"),
        (b"aGk= 0\nbHU= 1\n", "256 single bytes"),
    ],
)
def test_bad_ranks(tmp_path, content, says):
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(UserError, match=says):
        adopt_tokenizer(tmp_path / "r", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_tiktoken_output_name(tmp_path):
    with pytest.raises(UserError, match=r"end in \.json"):
        adopt_tokenizer(ranks(tmp_path / "r"), tmp_path / "r.model")


def test_sentencepiece_is_taken_over_unchanged(tmp_path, model):
    adopted = adopt_tokenizer(model, tmp_path / "mine.model")
    assert adopted.path.read_bytes() == model.read_bytes()
    record = json.loads((tmp_path / "mine.model.json").read_text())
    assert (record["kind"], record["vocab_size"], record["eod"]) == ("sentencepiece", 400, 2)
